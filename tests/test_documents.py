"""What documents say that a command prints or a simulation gives is what they give today."""

import re
from collections.abc import Sequence

import pytest
import torch.distributed as dist

from docs import folding
from docs.refresh import BLOCKS, DOCUMENTS, ROOT, Job, said, simulated, texts
from tedlab.degrees import ParallelDegrees
from tedlab.predict.sim import Simulation
from tests.pool import WorkerPool
from tests.predict.sim.test_simulation import out_of_the_pools_group
from tests.selection import asked_of


def test_every_block_of_every_document_is_refreshed() -> None:
    marked = {name for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")] for name in _marks(path.read_text())}
    assert marked == set(said()) == set(BLOCKS)
    assert all(path.exists() for path in DOCUMENTS)


@pytest.mark.parametrize("degrees", [folding.TED, folding.FOLDED], ids=str)
def test_the_picture_of_folding_has_each_part_of_each_expert_once_in_each_replica(degrees: ParallelDegrees) -> None:
    for replica in range(degrees.expert_data):
        ranks = [rank for rank in range(8) if degrees.coordinates(rank)["expert_data"] == replica]
        parts = sorted((number, part) for rank in ranks for number, (part, _) in folding.held(degrees, rank).items())
        assert parts == [(n, part) for n in range(folding.EXPERTS) for part in range(degrees.expert_tensor)]
    for kind in degrees.sizes:
        assert sorted(rank for members in folding.groups(degrees, kind) for rank in members) == [*range(8)]


def _marks(text: str) -> list[str]:
    return re.findall(r"<!-- (?:refresh|end) (\S+) -->", text)


OFTEN = ("simulate", "published", "folding")  # CI leaves the others' eighteen simulations out, of a quarter of a minute


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
