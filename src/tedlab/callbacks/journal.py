"""Writes one row of metrics per step that has any to every logger, numbered by the optimizer steps done.

Lightning's own logging is not used: it numbers rows of training and the final validation differently, and repeats a
value that was logged once in all later rows of the epoch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from tedlab.history import TOKENS


def log(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Adds metrics to the row of this step, and to ``trainer.callback_metrics``.

    If the callbacks include no :class:`Journal`, the metrics become a row of their own.
    """
    trainer.callback_metrics.update({name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()})
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Journal):
            callback.row.update(metrics)
            return
    _write(trainer, metrics)


class Journal(Callback):
    """Writes one row with what earlier callbacks log in a step, and one with the results of each validation.

    Each row also has ``step``, the number of optimizer steps done; ``tokens``, the number of tokens read by then over
    all data ranks; and ``epoch``.

    Args:
        read: Returns the number of tokens that the steps from one up to, without, another read over all data ranks.
    """

    def __init__(self, read: Callable[[int, int], int]) -> None:
        self.read = read
        self.row: dict[str, float] = {}
        self._before: tuple[int, int] | None = None  # steps and tokens at the start of this run
        self._trainer: Trainer | None = None
        self._epoch = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                logger.experiment.define_metric(TOKENS)  # lets W&B plot any metric over tokens

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._trainer is None else {"steps": self._trainer.global_step, TOKENS: self.tokens()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._before = state_dict["steps"], state_dict[TOKENS]

    def tokens(self) -> int:
        """Returns the tokens read so far. A checkpoint holds those of earlier runs, whose batch size may differ."""
        assert self._trainer is not None
        steps, tokens = self._before or (0, 0)
        return tokens + self.read(steps, self._trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._epoch = trainer.current_epoch
        if self.row:
            self._write_row(trainer, self.row)
            self.row = {}

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if found and not trainer.sanity_checking:
            self._write_row(trainer, found)

    def _write_row(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        _write(trainer, {"epoch": self._epoch, TOKENS: self.tokens(), **metrics})


def _write(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)
        logger.save()
