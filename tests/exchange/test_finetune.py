"""The example of fine-tuning: what examples/finetune/finetune.sh promises, from a dense run to experts of a layout."""

import json
import os
import shlex
from pathlib import Path

import pytest
import torch

from tedlab.checkpoint.pieces import PieceReader
from tests.commands import run_forked
from tests.pool import WorkerPool

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune" / "finetune.sh"
STEPS = 10
LAST = Path("checkpoints", "last.ckpt")


def commands(overrides: list[str]) -> list[list[str]]:
    lines = SCRIPT.read_text().replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if line.startswith("tedlab ")]
    return [[given for word in line[1:] for given in (overrides if word == "$@" else [word])] for line in words]


@pytest.fixture(scope="module")
def folder(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the script has run, with a short text and few steps; ``pool``: its server has imported everything."""
    place = tmp_path_factory.mktemp("finetune")
    (place / "text.txt").write_text("".join(f"{number} is less than {number + 1}\n" for number in range(4000)))
    overrides = [
        *("data=text", "data.path=text.txt", "data.cache_dir=cache", "data.batch_size=4", "data.micro_batch_size=2"),
        *("data.validation_samples=4", f"trainer.max_steps={STEPS}", "optim.warmup_steps=1", "logger=none"),
        *("validate_every=100", "check_replicas_every=1", "model.sequence_length=32"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    for command in commands(overrides):
        done = run_forked("tedlab", command, place, environment, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
    return place / "runs" / "finetune"


@pytest.mark.slow
def test_experts_and_routers_move_and_nothing_else_does(folder: Path) -> None:
    before, after = (PieceReader(folder / name / LAST) for name in ("mixture", "experts"))
    names = [name for name in before.tensors if name.startswith("model.")]
    assert len(names) > 10
    for name in names:
        moved = not torch.equal(before.read(name), after.read(name))
        assert moved == (".experts." in name or ".router." in name), name
    state = {name.split(".state.")[1] for name in after.tensors if ".state." in name}
    assert state
    assert all(".experts." in name or ".router." in name for name in state)


@pytest.mark.slow
def test_the_run_of_four_processes_communicates_what_the_closed_form_says(folder: Path) -> None:
    summary = json.loads((folder / "experts" / "summary.json").read_text())
    assert summary["comm/predicted_difference_bytes"] == summary["comm/predicted_difference_calls"] == 0
    assert summary["state"] == "finished"


@pytest.mark.slow
def test_it_goes_on_where_the_dense_model_ended(folder: Path) -> None:
    summaries = (json.loads((folder / name / "summary.json").read_text()) for name in ("dense", "experts"))
    dense, tuned = (summary["val/loss"] for summary in summaries)
    assert tuned < dense  # as no model with random layers would be after so few steps
