"""Rows of metrics: one for each step that has any, none twice, at the steps and tokens that were done."""

import csv
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from tedlab.callbacks import Journal, StepMetrics, log
from tedlab.callbacks.ledger import CommunicationLedger
from tedlab.config import CommConfig, LedgerConfig
from tests.pool import WorkerPool
from tests.training import Job, Layout, language_model, loader, trainer

STEPS, TOKENS = 5, 100  # of a step, as the journal is told
JOB = Job(steps=STEPS)


class Once(Callback):
    """Logs a value after step 2 alone."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2 and batch_idx % 2:  # the second micro-batch of the step
            log(trainer, {"once": 7.0})


def rows_of(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def read_by(tokens: int, first: int, last: int) -> int:
    return tokens * (last - first)


def train(directory: Path) -> list[dict[str, float]]:
    """Two runs: five steps that validate after the third and at the end, and three more from its checkpoint."""
    shown = []
    for folder, steps, tokens in (("one", STEPS, TOKENS), ("two", STEPS + 3, 2 * TOKENS)):
        read = partial(read_by, tokens)
        fit = trainer(
            Layout(),
            JOB,
            max_steps=steps,
            log_every_n_steps=1,
            callbacks=[StepMetrics(read, read), Once(), Journal(read)],
            logger=CSVLogger(directory / folder, name="", version=""),
            accumulate_grad_batches=2,
            val_check_interval=6,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=1,
        )
        module, data = language_model(JOB), loader(Layout(), JOB, 0)
        checkpoint = None if folder == "one" else directory / "one.ckpt"
        fit.fit(module, data, data, ckpt_path=checkpoint)
        fit.save_checkpoint(directory / f"{folder}.ckpt")
        shown.append({name: value.item() for name, value in fit.callback_metrics.items()})
        fit.validate(module, data, verbose=False)
    return shown


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def shown(pool: WorkerPool, directory: Path) -> list[dict[str, float]]:
    return pool.run(1, train, directory)[0]


@pytest.mark.usefixtures("shown")
def test_training_and_validation_are_logged_after_the_same_number_of_steps(directory: Path) -> None:
    rows = rows_of(directory / "one")
    assert [int(row["step"]) for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5]
    assert [int(row["step"]) for row in rows if "val/loss" in row] == [3, 5]
    assert len(rows) == 7
    assert all(int(row["tokens"]) == int(row["step"]) * TOKENS for row in rows)


@pytest.mark.usefixtures("shown")
def test_a_value_that_was_logged_once_is_in_one_row(directory: Path) -> None:
    rows = rows_of(directory / "one")
    assert [row["step"] for row in rows if "once" in row] == ["2"]
    assert "train/loss" in next(row for row in rows if "once" in row)  # in that of the step


def test_other_callbacks_see_what_was_logged(shown: list[dict[str, float]], directory: Path) -> None:
    """For a monitor and the progress line: the last values, with all digits."""
    assert shown[0]["once"] == 7.0
    assert repr(shown[0]["train/loss"]) == [row["train/loss"] for row in rows_of(directory / "one") if len(row) > 5][-1]
    assert "val/loss" in shown[0]


@pytest.mark.usefixtures("shown")
def test_tokens_go_on_from_a_checkpoint_also_with_another_batch_size(directory: Path) -> None:
    rows = rows_of(directory / "two")
    expected = [(str(STEPS + n), str(STEPS * TOKENS + n * 2 * TOKENS)) for n in (1, 2, 3)]
    assert [(row["step"], row["tokens"]) for row in rows if "train/loss" in row] == expected


def counted(totals: list[dict[str, float]], every: int = 1) -> list[dict[str, float]]:
    """What a ledger logs that has counted so much after each step."""
    config: Any = SimpleNamespace(comm=CommConfig(ledger=LedgerConfig(every=every)))
    ledger, logged = CommunicationLedger(config), []
    place: Any = SimpleNamespace(
        global_step=0, accumulate_grad_batches=1, callback_metrics={}, callbacks=[], loggers=[]
    )
    place.loggers = [SimpleNamespace(log_metrics=lambda row, step: logged.append({"step": step} | row), save=int)]
    for step, total in enumerate(totals, start=1):
        place.global_step = step
        ledger._metrics = lambda total=total: total  # type: ignore[method-assign]
        ledger.on_train_batch_end(place, None, None, None, 0)  # type: ignore[arg-type]
    return logged


NAME = "comm/forward/tensor/all_reduce/calls"


def test_communication_is_logged_by_step_when_it_changes_and_never_again() -> None:
    assert counted([{NAME: 4 * step} for step in range(1, 9)]) == [{"step": 1, NAME: 4}]
    assert counted([{NAME: 4 * step} for step in range(1, 9)], every=3) == [{"step": 3, NAME: 4}]
    growing = [{NAME: n} for n in (4, 8, 13, 18, 22)]
    assert counted(growing) == [{"step": 1, NAME: 4}, {"step": 3, NAME: 5}, {"step": 5, NAME: 4}]
    assert counted([{NAME: 4, "comm/validation/tensor/all_reduce/calls": n} for n in (1, 2)])[0] == {"step": 1, NAME: 4}


def test_a_run_that_was_resumed_where_it_ends_has_no_throughput() -> None:
    """The checkpoint that it went on from was replaced by that of the end after it had been looked at."""
    assert StepMetrics(lambda first, last: 1, lambda first, last: 1).overall() == {}
