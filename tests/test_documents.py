"""What documents say that a command prints or a simulation gives is what they give today."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from docs import expert_parallel, folding, overview
from docs.commands import QUICK, commands, run_commands, words
from docs.refresh import BLOCKS, DOCUMENTS, PRINTED, ROOT, Job, agrees, printed, said, simulated, texts
from tedlab.certify.certificate import CONTINUATIONS
from tedlab.certify.record import QUANTITIES
from tedlab.degrees import ParallelDegrees
from tedlab.predict.sim import Simulation
from tests.commands import run_forked
from tests.pool import WorkerPool
from tests.predict.sim.test_simulation import out_of_the_pools_group
from tests.selection import asked_of


def test_every_block_of_every_document_is_refreshed() -> None:
    marked = {name for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")] for name in _marks(path.read_text())}
    assert marked == set(said()) == {*BLOCKS, *PRINTED}
    assert all(path.exists() for path in DOCUMENTS)


@pytest.mark.parametrize("degrees", [folding.TED, folding.FOLDED, overview.SHOWN], ids=str)
def test_pictures_have_each_part_of_each_expert_once_in_each_replica(degrees: ParallelDegrees) -> None:
    for replica in range(degrees.expert_data):
        ranks = [rank for rank in range(8) if degrees.coordinates(rank)["expert_data"] == replica]
        parts = sorted((number, part) for rank in ranks for number, (part, _) in folding.held(degrees, rank).items())
        assert parts == [(n, part) for n in range(folding.EXPERTS) for part in range(degrees.expert_tensor)]
    for kind in degrees.sizes:
        assert sorted(rank for members in folding.groups(degrees, kind) for rank in members) == [*range(8)]


@pytest.mark.parametrize("draw", [expert_parallel.draw, expert_parallel.draw_four])
def test_pictures_of_experts_on_several_gpus_are_drawn_from_what_was_measured(
    tmp_path: Path, draw: Callable[[Path], None]
) -> None:
    draw(tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 10_000


def _marks(text: str) -> list[str]:
    return re.findall(r"<!-- (?:refresh|end) (\S+) -->", text)


def test_output_without_a_mark_is_in_no_document() -> None:
    """What looks like a table of a terminal stands where ``docs.refresh`` writes it."""
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        by_hand = re.sub(r"<!-- refresh (\S+) -->.*?<!-- end \1 -->", "", path.read_text(), flags=re.DOTALL)
        assert not re.search("[┏┌│]", by_hand), path


def test_commands_are_found_and_run_as_typed(tmp_path: Path) -> None:
    typed = "# about\ntedlab one \\\n    'a b'   # so\npip x\ntedlab two k=runs/<date>/f\n"
    text = f"```bash\n{typed}```\n```py\ntedlab no\n```\n"
    (tmp_path / "runs" / "new").mkdir(parents=True)
    ran = []
    run_commands(commands(text), tmp_path, lambda words, _: ran.append(list(words)) or "", {"two": ["more"]})
    assert ran == [["one", "a b"], ["two", "k=runs/new/f", "more"]]


def test_words_are_what_is_left_without_numbers() -> None:
    assert words("│ loss │ 1,2.5e-3 ×0.15 │") == ["loss", "#", "×#"] == words("┃ loss ┃ 7   ×9 ┃")


OFTEN = ("published", "folding")  # CI leaves the others' eighteen simulations out, of a quarter of a minute


@pytest.fixture(scope="module")
def right(pool: WorkerPool, request: pytest.FixtureRequest) -> dict[str, str]:
    """What the blocks of this session should say. Two forked processes simulate: starting others takes long."""

    def run(jobs: Sequence[Job]) -> list[Simulation]:
        halves = pool.run(2, half_of, jobs, timeout=500)
        return [halves[number % 2][number // 2] for number in range(len(jobs))]

    return texts([asked["name"] for asked in asked_of(request)], run)


def half_of(jobs: Sequence[Job]) -> list[Simulation]:
    mine = jobs[dist.get_rank() :: 2]
    with out_of_the_pools_group():
        return [simulated(job) for job in mine]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in OFTEN else pytest.mark.exhaustive) for name in BLOCKS]
)
@pytest.mark.timeout(600)
def test_documents_say_what_the_code_gives(right: dict[str, str], name: str) -> None:
    """`python -m docs.refresh` writes what is right; then read the text around it."""
    assert said()[name] == right[name]


# Minutes; half a minute for words of which the next test knows most; and for those of an ablation, of which
# test_train.py and test_tutorials.py have others.
LONG = ("plan", "certificate", "compare")


def test_the_certificate_that_is_shown_has_every_quantity() -> None:
    rows = re.findall(r"^│ (.*?) +│", said()["certificate"], re.MULTILINE)
    assert rows == [*QUANTITIES, *(f"checkpoint continued {name}" for name in CONTINUATIONS)]


@pytest.fixture(scope="module")
def shown(pool: WorkerPool, request: pytest.FixtureRequest) -> dict[str, str]:
    """What the commands above the blocks of this session print; training is shorter than documents say."""

    def run(arguments: Sequence[str], folder: Path) -> str:
        done = run_forked("tedlab", arguments, folder, {**os.environ, "OMP_NUM_THREADS": "1"}, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return printed([asked["name"] for asked in asked_of(request)], run, {"train": QUICK})


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.exhaustive if name in LONG else pytest.mark.slow) for name in PRINTED],
)
@pytest.mark.timeout(600)
def test_documents_show_what_commands_print(shown: dict[str, str], name: str) -> None:
    """Also `python -m docs.refresh`, where numbers may differ."""
    assert agrees(name, said()[name], shown[name]), shown[name]
