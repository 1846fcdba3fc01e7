"""What a run that goes on in its own directory keeps."""

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from tedlab.evaluation import results
from tedlab.run import _keep_earlier_metrics, _save_last
from tests.test_validate import write_checkpoint


class HasLogger:
    """The part of a Trainer that matters here."""

    def __init__(self, directory: Path, dies_after: int | None = None) -> None:
        logger = CSVLogger(directory, name="", version="", flush_logs_every_n_steps=1)
        self.loggers: list[Any] = [logger]
        log, self.left = logger.log_metrics, dies_after

        def until_death(metrics: dict[str, float], step: int) -> None:
            if self.left is not None:
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left -= 1
            log(metrics, step)

        logger.log_metrics = until_death  # type: ignore[method-assign]


def losses(directory: Path) -> dict[int, float]:
    with (directory / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file)}


def test_rows_of_metrics_outlive_a_death_while_they_are_taken_over(tmp_path: Path) -> None:
    rows = {step: 1 / (step + 3) for step in range(8)}
    lines = ["step,tokens,train/loss", *(f"{step},{64 * step},{loss!r}" for step, loss in rows.items()), "8,512,0.12"]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))  # the last one without its end
    for dies_after in (3, 0, 5):
        with pytest.raises(KeyboardInterrupt):
            _keep_earlier_metrics(HasLogger(tmp_path, dies_after), tmp_path, until=5)  # type: ignore[arg-type]
    _keep_earlier_metrics(HasLogger(tmp_path), tmp_path, until=5)  # type: ignore[arg-type]
    assert losses(tmp_path) == {step: loss for step, loss in rows.items() if step < 6}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_run_that_begins_leaves_no_rows_of_an_earlier_one_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,tokens,train/loss\n0,0,3.0\n1,64,2.0\n")
    with pytest.raises(KeyboardInterrupt):
        _keep_earlier_metrics(HasLogger(tmp_path, 1), tmp_path, until=1)  # type: ignore[arg-type]
    _keep_earlier_metrics(HasLogger(tmp_path), tmp_path, until=None)  # type: ignore[arg-type]
    (tmp_path / "metrics.csv").write_text(
        "step,tokens,train/loss\n0,0,0.5\n1,64,0.25\n"
    )  # as the run that begins writes them
    _keep_earlier_metrics(HasLogger(tmp_path), tmp_path, until=1)  # type: ignore[arg-type]
    assert losses(tmp_path) == {0: 0.5, 1: 0.25}


@pytest.mark.parametrize(("until", "kept"), [(None, []), (5, [5]), (20, [5, 20])])
def test_evaluations_of_an_earlier_run_are_not_those_of_the_one_that_begins(
    tmp_path: Path, until: int | None, kept: list[int]
) -> None:
    for step in (5, 20):
        results.write(tmp_path / "eval", step, f"book_{step}", {"eval/book/loss": 2.0}, {})
    (tmp_path / "eval" / "step_by_step.json").touch()  # no result
    _keep_earlier_metrics(HasLogger(tmp_path), tmp_path, until)  # type: ignore[arg-type]
    names = [*(f"step_{step}_book_{step}.json" for step in kept), "step_by_step.json"]
    assert sorted(file.name for file in (tmp_path / "eval").iterdir()) == sorted(names)


class Process:
    """The part of a Trainer that matters here; the first process tells the others what it has decided."""

    def __init__(self, rank: int, told: list[bool]) -> None:
        self.is_global_zero, self.global_step, self.saved = rank == 0, 6, False
        self.strategy, self._told = self, told

    def broadcast(self, own: bool) -> bool:
        if self.is_global_zero:
            self._told.append(own)
        return self._told[-1]

    def save_checkpoint(self, path: Path) -> None:
        self.saved = True


@pytest.mark.parametrize("steps", [(5, 6), (6, 5), (None, 6), (6, None)])
def test_all_processes_save_the_end_of_a_run_or_none_whatever_each_sees(
    tmp_path: Path, steps: tuple[int | None, int | None]
) -> None:
    told: list[bool] = []
    for rank, step in enumerate(steps):
        last, process = tmp_path / str(rank), Process(rank, told)
        if step is not None:
            write_checkpoint(last, {"global_step": step})
        _save_last(process, last)  # type: ignore[arg-type]
        assert process.saved == (steps[0] != 6)
