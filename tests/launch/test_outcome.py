"""What a run leaves that did not finish, and that a failed one is a failed one everywhere."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from tedlab import run as run_module
from tedlab.commands.train import leave_summary
from tedlab.config import TrainConfig
from tedlab.errors import WorkerFailed
from tedlab.launch.outcome import (
    FAILED,
    INTERRUPTED,
    Outcome,
    Signalled,
    read_summary,
    signals_raised,
    write_unfinished,
)
from tests.offline_wandb import read_offline_run

ROWS = "epoch,step,tokens,train/loss,val/loss,comm/a/b/c/calls\n0,10,100,3.5,,4.0\n0,20,200,3.25,,\n0,20,200,,3.0,\n"


def summary_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ValueError("bad\nvery"), Outcome(FAILED, "ValueError: bad")),
        (MemoryError(), Outcome(FAILED, "MemoryError")),
        (KeyboardInterrupt(), Outcome(INTERRUPTED, "SIGINT")),
        (Signalled(signal.SIGTERM), Outcome(INTERRUPTED, "SIGTERM")),
        (SystemExit(3), Outcome(FAILED, "SystemExit: 3")),
    ],
)
def test_what_ended_a_run_is_said_in_a_line(error: BaseException, outcome: Outcome) -> None:
    assert Outcome.of(error) == outcome


def test_lightnings_exit_after_ctrl_c_is_an_interruption() -> None:
    error = SystemExit(1)
    error.__context__ = KeyboardInterrupt()
    assert Outcome.of(error) == Outcome(INTERRUPTED, "SIGINT")


def test_the_last_values_of_a_run_that_did_not_finish_are_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(f"{ROWS}0,3")  # and a line that was being written
    write_unfinished(tmp_path, Outcome(FAILED, "why"))
    assert summary_of(tmp_path) == {
        "train/loss": 3.25,
        "val/loss": 3.0,
        "steps": 20,
        "output_dir": str(tmp_path),
        "state": "failed",
        "reason": "why",
    }
    write_unfinished(tmp_path, Outcome(INTERRUPTED, "SIGTERM"), {"steps": 22, "parameters/total": 5})
    write_unfinished(tmp_path, Outcome(FAILED, "what came first"))  # the launcher knows better than the first process
    summary = summary_of(tmp_path)
    assert (summary["steps"], summary["parameters/total"]) == (22, 5)
    assert (summary["state"], summary["reason"]) == ("failed", "what came first")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.csv", "summary.json"]


def test_a_run_that_logged_nothing_leaves_that(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"half')
    write_unfinished(tmp_path, Outcome(FAILED, "why"))
    assert summary_of(tmp_path) == {"steps": 0, "output_dir": str(tmp_path), "state": "failed", "reason": "why"}


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (WorkerFailed("process 1 of 4 failed; all were ended.\n\nTraceback\n  line\nValueError: bad\n"), "failed",
         "process 1 of 4 failed; all were ended. ValueError: bad"),
        (WorkerFailed("W&B: no key (process 0 of 4; its traceback: failure.log)"), "failed",
         "W&B: no key (process 0 of 4; its traceback: failure.log)"),
        (SystemExit(128 + signal.SIGINT), "interrupted", "SIGINT"),
        (SystemExit(128 + signal.SIGHUP), "interrupted", "SIGHUP"),
    ],
)  # fmt: skip
def test_the_launcher_says_why_its_workers_ended(tmp_path: Path, error: BaseException, state: str, reason: str) -> None:
    leave_summary(TrainConfig(output_dir=str(tmp_path)), error)
    assert (summary_of(tmp_path)["state"], summary_of(tmp_path)["reason"]) == (state, reason)


def test_a_finished_run_stays_finished_when_another_cannot_even_start_in_its_directory(tmp_path: Path) -> None:
    for summary in ({"state": "finished", "steps": 3}, {"steps": 3}):  # the second of a version that did not say
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        leave_summary(TrainConfig(output_dir=str(tmp_path)), WorkerFailed("process 0 of 1 failed\n\nImportError"))
        assert summary_of(tmp_path) == summary


def test_sigterm_is_told_at_once_and_then_raised_and_a_second_one_disturbs_nothing() -> None:
    told: list[Outcome] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    error = None
    with signals_raised(told.append):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Signalled as raised:
            error = raised
        assert told == [Outcome(INTERRUPTED, "SIGTERM")]
        for number in numbers:
            os.kill(os.getpid(), number)
    assert error is not None
    assert error.code == 143
    assert len(told) == 1
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_signal_that_python_swallows_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tedlab.launch.outcome._SWALLOWED_S", 0.1)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's makes it a warning

    class Thing:
        """Can be referred to weakly."""

    thing, told = Thing(), []
    gone = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    swallowed = raised = False
    with signals_raised(told.append) as arrived:
        try:
            del thing
            swallowed = gone() is None
            time.sleep(10)
        except Signalled:
            arrived()
            raised = True
            time.sleep(0.3)  # nothing is raised any more
    assert swallowed
    assert raised
    assert told == [Outcome(INTERRUPTED, "SIGTERM")]


def test_a_signal_that_surfaces_as_another_failure_is_the_reason(tmp_path: Path) -> None:
    """Writing a checkpoint turns whatever interrupts it into an OSError."""
    strategy = SimpleNamespace(cluster_environment=None)
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=7, loggers=[], strategy=strategy)

    def checkpoint() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Signalled as error:
            raise OSError("could not write") from error

    with (
        pytest.raises(Signalled),  # so that a scheduler sees the exit code of SIGTERM
        run_module._ending(TrainConfig(output_dir=str(tmp_path)), trainer, SimpleNamespace()),  # type: ignore[arg-type]
    ):
        checkpoint()
    assert (read_summary(tmp_path)["state"], read_summary(tmp_path)["reason"]) == (INTERRUPTED, "SIGTERM")


@mock.patch.dict(os.environ)  # W&B notes in it where its service is
def test_wandb_marks_a_run_as_failed_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="tedlab", save_dir=tmp_path, mode="offline")
    strategy = SimpleNamespace(cluster_environment=None)
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=7, loggers=[None, logger], strategy=strategy)
    logger.log_metrics({"train/loss": 3.0}, 7)
    with (
        pytest.raises(ValueError, match="bad"),
        run_module._ending(TrainConfig(output_dir=str(tmp_path)), trainer, SimpleNamespace()),  # type: ignore[arg-type]
    ):
        raise ValueError("bad")
    assert wandb.run is None
    deadline = time.monotonic() + 10
    while (logged := read_offline_run(tmp_path)).exit_code is None and time.monotonic() < deadline:
        time.sleep(0.1)  # W&B's service may close the file after it has answered
    assert logged.exit_code == 1
    assert logged.summary["state"] == "failed"
    assert logged.summary["reason"] == "ValueError: bad"
    assert summary_of(tmp_path)["steps"] == 7


@mock.patch.dict(os.environ)
def test_a_run_ends_as_ever_if_the_signal_has_ended_wandbs_service_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SLURM sends SIGTERM to all processes of a step."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="tedlab", save_dir=tmp_path, mode="offline")
    strategy = SimpleNamespace(cluster_environment=None)
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=7, loggers=[None, logger], strategy=strategy)
    logger.log_metrics({"train/loss": 3.0}, 7)
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    services = [int(line.split()[0]) for line in children.stdout.splitlines() if "wandb-core" in line]
    assert services, children.stdout
    for service in services:  # those of tests before this one may still be ending
        os.kill(service, signal.SIGKILL)
    with (
        pytest.raises(Signalled),
        run_module._ending(TrainConfig(output_dir=str(tmp_path)), trainer, SimpleNamespace()),  # type: ignore[arg-type]
    ):
        os.kill(os.getpid(), signal.SIGTERM)
    assert summary_of(tmp_path)["state"] == INTERRUPTED
    assert "W&B was not told how this run ended: " in capsys.readouterr().err
    wandb.run = None  # which nobody could finish
