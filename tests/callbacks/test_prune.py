"""A run of a search is stopped when Optuna's pruner, told of the runs beside it, says so."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tedlab.callbacks import Prune

optuna = pytest.importorskip("optuna", reason="needs tedlab[optuna]")


def write(directory: Path, losses: dict[int, float], state: str = "finished") -> None:
    """A run that has ended, with the losses of its validations by step."""
    directory.mkdir(parents=True)
    (directory / "summary.json").write_text(json.dumps({"state": state, "steps": max(losses)}))
    with (directory / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "tokens", "val/loss"])
        rows.writerows([step, step, loss] for step, loss in losses.items())


def train(directory: Path, losses: dict[int, float], pruner: Any, rank: int = 0) -> tuple[int | None, dict[str, Any]]:
    """Validates with these losses; returns the step at which the run was stopped, and what its summary gets."""
    directory.mkdir(exist_ok=True)
    trainer: Any = SimpleNamespace(
        sanity_checking=False, is_global_zero=rank == 0, should_stop=False, max_steps=40, callback_metrics={}
    )
    trainer.strategy = SimpleNamespace(broadcast=lambda mine: mine)
    prune = Prune(pruner, str(directory))
    for step, loss in losses.items():
        trainer.global_step = step
        trainer.callback_metrics = {"val/loss": torch.tensor(loss)}
        prune.on_validation_end(trainer, SimpleNamespace())  # type: ignore[arg-type]
        if trainer.should_stop:
            return step, prune.outcome()
    return None, prune.outcome()


def median(**settings: int) -> Any:
    return optuna.pruners.MedianPruner(**({"n_startup_trials": 2, "n_warmup_steps": 0} | settings))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three runs: the medians of their losses are 4 at step 10 and 2 at step 20."""
    for number, losses in enumerate(({10: 5.0, 20: 3.0}, {10: 4.0, 20: 2.0}, {10: 3.0, 20: 1.0})):
        write(tmp_path / str(number), losses)
    return tmp_path


@pytest.mark.parametrize(
    ("losses", "stopped"), [({10: 4.5, 20: 1.0}, 10), ({10: 3.5, 20: 2.5, 30: 0.1}, 20), ({10: 3.5, 20: 1.5}, None)]
)
def test_a_run_is_stopped_where_it_is_above_the_median_of_the_others(
    sweep: Path, losses: dict[int, float], stopped: int | None
) -> None:
    at, outcome = train(sweep / "3", losses, median())
    assert at == stopped
    assert (outcome.get("state") == "pruned") == (stopped is not None)


def test_early_runs_and_early_steps_are_not_judged(sweep: Path) -> None:
    assert train(sweep / "3", {10: 9.0}, median(n_startup_trials=4))[0] is None
    assert train(sweep / "3", {10: 9.0, 20: 9.0}, median(n_warmup_steps=15))[0] == 20


def test_runs_that_failed_or_go_on_do_not_count(tmp_path: Path) -> None:
    write(tmp_path / "0", {10: 1.0}, "failed")
    write(tmp_path / "1", {10: 1.0}, "interrupted")
    write(tmp_path / "2", {10: 1.0})
    (tmp_path / "2" / "summary.json").unlink()
    (tmp_path / "multirun.yaml").touch()
    assert train(tmp_path / "3", {10: 9.0}, median(n_startup_trials=1))[0] is None


def test_the_last_step_is_never_too_late_and_other_processes_do_not_read(sweep: Path) -> None:
    assert train(sweep / "3", {40: 9.0}, median())[0] is None
    assert train(sweep / "3", {10: 9.0}, median(), rank=1)[0] is None


def test_the_reason_has_the_loss_and_the_pruner(sweep: Path) -> None:
    _, outcome = train(sweep / "3", {10: 4.5}, median())
    assert outcome["reason"] == "MedianPruner: val/loss was 4.5 then"


@pytest.mark.parametrize("content", [b"step,tokens,val/loss\nx,1,1\n", b"\xff\xfe\n", b"tokens,val/loss\n1,1\n"])
def test_a_run_whose_metrics_are_damaged_does_not_count(sweep: Path, content: bytes) -> None:
    """The others are judged by as they would be without it."""
    (sweep / "2" / "metrics.csv").write_bytes(content)
    with pytest.warns(UserWarning, match="2/metrics.csv is damaged, and its run does not count"):
        assert train(sweep / "3", {10: 4.2}, median(n_startup_trials=3))[0] is None
    with pytest.warns(UserWarning, match="is damaged"):
        assert train(sweep / "3", {10: 4.6}, median())[0] == 10


def test_a_run_that_diverged_is_no_error(sweep: Path) -> None:
    write(sweep / "3", {10: float("nan"), 20: float("nan")})
    assert train(sweep / "4", {10: 5.5}, median())[0] == 10
