"""Checks values of the top level, of ``checkpoint`` and of ``data``, and where a run may write."""

import os
from pathlib import Path

from tedlab.config import TrainConfig

VALIDATION_METRICS = ("val/loss", "val/bits_per_byte")
OBJECTIVES = (*VALIDATION_METRICS, "train/loss", "perf/step_time_s", "memory/peak_bytes")


def validation_metrics(config: TrainConfig) -> tuple[str, ...]:
    """Returns the metrics of a run's validations that a sweeper or checkpoints may go by."""
    return (*VALIDATION_METRICS, *(f"val/{name}/loss" for name in config.eval.sets))


def check_settings(config: TrainConfig) -> None:
    """Checks the values that do not depend on the machine.

    Raises:
        ValueError: If a value is invalid; the message says what would do.
    """
    for name, value in (
        *(("output_dir", config.output_dir), ("experiment_name", config.experiment_name)),
        *(("data.cache_dir", config.data.cache_dir), ("data.field", config.data.field)),
    ):
        if not value:
            raise ValueError(f"{name} is empty; give it a value, or leave it out")
    measured = validation_metrics(config)
    objectives = tuple(dict.fromkeys((*measured, *OBJECTIVES)))
    if config.objective not in objectives:
        raise ValueError(f"objective={config.objective} is not a metric of a run; valid: {', '.join(objectives)}")
    monitor = config.checkpoint.monitor
    if monitor not in (None, *measured):
        raise ValueError(f"checkpoint.monitor={monitor} is not a validation metric: {', '.join(measured)}")
    if monitor is not None and config.trainer.get("limit_val_batches") == 0:
        raise ValueError(f"checkpoint.monitor={monitor} is measured in validations, and trainer.limit_val_batches is 0")


def check_writable(name: str, folder: Path) -> None:
    """Refuses a folder that cannot be made or written to.

    Raises:
        ValueError: If the folder is refused, with the operating system's reason if it gives one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name}={folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{name}={folder} is a folder that this user may not write to")
