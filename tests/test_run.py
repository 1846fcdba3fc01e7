"""What a run that goes on in its own directory keeps."""

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from tedlab.run import _keep_earlier_metrics


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
