"""A damaged file in a run directory is one sentence of ``generate``, and a run that ``compare`` leaves out."""

import json
import random
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tedlab.compare.comparison import compare
from tedlab.compare.page import page
from tedlab.compare.runs import read_runs
from tedlab.compare.terminal import show
from tedlab.errors import UsageError
from tests.checkpoint.small import DAMAGES, damaged
from tests.compare.sweep import ledger, write_run
from tests.pool import WorkerPool
from tests.training import Job, Layout, language_model, loader, trainer

FLIPS = 25  # bits of each file, one at a time


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two finished runs; files of ``1`` are damaged."""
    for number in range(2):
        write_run(tmp_path / "runs" / str(number), {"seed": number}, ledger(dtd=bool(number), cac=False))
    shutil.copytree(tmp_path / "runs" / "1", tmp_path / "whole")
    return tmp_path / "runs"


def compared(runs: Path) -> tuple[list[str], list[str]]:
    """Names of the runs that are compared and what is said of the others, by everything that the command does."""
    found, notes = read_runs([runs])
    comparison = compare(found, [], notes, force=True)
    show(comparison, Console(file=StringIO(), width=200))
    page(comparison, [])
    return [run.name for run in found], notes


@pytest.mark.parametrize("file", ["config.yaml", "summary.json", "metrics.csv"])
def test_compare_leaves_a_damaged_run_out_and_says_why(runs: Path, file: str) -> None:
    assert compared(runs) == (["0", "1"], [])
    for damage in set(DAMAGES) - {"a bit flipped in the middle", "a bit flipped near the end", "longer"}:
        damaged(runs.parent / "whole", runs / "1", file, damage)
        names, notes = compared(runs)
        harmless = (file, damage) in {
            *((name, "cut by a byte") for name in ("config.yaml", "summary.json", "metrics.csv")),  # a line's end
            *(("metrics.csv", lost) for lost in ("deleted", "emptied", "cut in half")),  # fewer rows: as of an old run
            ("metrics.csv", "a bit flipped in the first byte"),  # of a column's name
            ("config.yaml", "a bit flipped in the first byte"),  # likewise
            ("config.yaml", "cut in half"),  # fewer settings
        }
        if harmless and names == ["0", "1"]:
            continue
        assert names == ["0"], damage
        (note,) = notes
        assert note.startswith(f"{runs / '1'} is left out: ")
        assert file in note
        assert len(note.splitlines()) == 1, note


@pytest.mark.parametrize("file", ["config.yaml", "summary.json", "metrics.csv"])
def test_no_flipped_bit_is_a_traceback_of_compare(runs: Path, file: str) -> None:
    content, draw, left_out = (runs / "1" / file).read_bytes(), random.Random(0), 0
    for _ in range(FLIPS):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (runs / "1" / file).write_bytes(changed)
        names, notes = compared(runs)
        left_out += len(notes)
        assert len(names) + len(notes) == 2
        assert all(len(note.splitlines()) == 1 for note in notes)
    assert 0 < left_out < FLIPS


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "many"),
        ("steps", 10**400),
        ("steps", -1),
        ("steps", True),
        ("steps", [1]),
        ("comm/steps", 0.5),
        ("perf/step_time_s", "fast"),
        ("perf/step_time_s", {"a": 1}),
        ("memory/peak_bytes", 10**400),
        ("parameters/total", "1"),
    ],
    ids=str,
)
def test_a_summary_of_other_things_than_numbers_is_left_out(runs: Path, key: str, value: object) -> None:
    summary = json.loads((runs / "1" / "summary.json").read_text())
    (runs / "1" / "summary.json").write_text(json.dumps(summary | {key: value}))
    names, (note,) = compared(runs)
    assert names == ["0"]
    assert f"summary.json is damaged ({key} is" in note


# ---- generate ----------------------------------------------------------------------------------------------------


def generated(folder: Path) -> list[tuple[str, str, str, bool]]:
    """File, damage, what ``generate`` prints or exits with, and whether it failed, for every damage to every file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from tedlab.commands.generate import task
    from tedlab.config import GenerateConfig

    whole, bad = folder / "whole", folder / "bad"
    fit = trainer(Layout(), Job(), max_steps=1)
    fit.fit(language_model(Job()), loader(Layout(), Job(), 0))
    last = whole / "checkpoints" / "last.ckpt"
    fit.save_checkpoint(last)
    (whole / "config.yaml").write_text("seed: 0\n")
    letters = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz ,.!?"]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(whole / "tokenizer.json"))

    def outcome(directory: Path) -> tuple[str, bool]:
        try:
            task(GenerateConfig(run=str(directory), tokens=1, prompt="abc"))
        except UsageError as error:
            return str(error), True
        return "", False

    said = [("nothing", "", *outcome(whole))]
    damaged(whole, bad, "tokenizer.json", "deleted")
    (bad / "config.yaml").write_text("data: {tokenizer: bpe}")
    said.append(("no tokenizer", "", *outcome(bad)))
    files = ["tokenizer.json", *(str(file.relative_to(whole)) for file in last.iterdir())]
    for file in files:
        for damage in DAMAGES:
            damaged(whole, bad, file, damage)
            said.append((file, damage, *outcome(bad)))
    content, draw = (whole / "tokenizer.json").read_bytes(), random.Random(0)
    for number in range(FLIPS):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        damaged(whole, bad, "tokenizer.json", "emptied")
        (bad / "tokenizer.json").write_bytes(changed)
        said.append(("tokenizer.json", f"flip {number}", *outcome(bad)))
    return said


@pytest.fixture(scope="module")
def said(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, str, bool]]:
    return pool.run(1, generated, tmp_path_factory.mktemp("generate"))[0]


def test_every_damage_to_a_checkpoint_is_one_sentence_of_generate(said: list[tuple[str, str, str, bool]]) -> None:
    assert said[0] == ("nothing", "", "", False)
    of_checkpoint = [row for row in said[1:] if "last.ckpt" in row[0]]
    assert len(of_checkpoint) == 4 * len(DAMAGES)
    for file, damage, message, failed in of_checkpoint:
        assert failed, (file, damage)
        assert Path(file).name in message, (damage, message)
        assert len(message.splitlines()) == 1, (damage, message)


def test_no_damage_to_a_tokenizer_is_a_traceback_of_generate(said: list[tuple[str, str, str, bool]]) -> None:
    """Some flipped bits make another tokenizer. A missing one would mean bytes, so it is missed."""
    ((_, _, missing, failed),) = [row for row in said if row[0] == "no tokenizer"]
    assert failed
    assert "tokenizer.json is missing, and the run has data.tokenizer=bpe" in missing
    rows = [row for row in said if row[0] == "tokenizer.json"]
    for _, damage, message, failed in rows:
        assert not failed or len(message.splitlines()) == 1, (damage, message)
        if damage in ("emptied", "garbage", "cut in half"):
            assert "tokenizer.json" in message
    assert 0 < sum(failed for *_, failed in rows) < len(rows)
