"""Lets each optimizer step take what its stage says (``data.ramp``)."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from tedlab._compat.lightning import MicroBatches
from tedlab.data.ramp import Ramp
from tedlab.module import LanguageModel

_NEVER = sys.maxsize  # batches until Lightning validates


class FollowRamp(Callback):
    """Sets the number of micro-batches of each step, and the length of the rows that the model reads them as.

    Lightning counts batches to the next validation, of which steps then have different numbers, so this callback also
    says when to validate.

    Args:
        ramp: The stages of the run.
        micro_batch_size: Samples of a micro-batch of one data rank.
        validate_every: Number of steps between validations.
    """

    def __init__(self, ramp: Ramp, micro_batch_size: int, validate_every: int) -> None:
        self.ramp, self.micro_batch_size, self.validate_every = ramp, micro_batch_size, validate_every

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.val_check_batch = _NEVER
        # A run that resumes counts whole steps of this size as read, see TextDataModule.train_dataloader.
        self._begin(trainer, pl_module, 0)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module, 0)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ended = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        trainer.val_check_batch = 1 if ended and trainer.global_step % self.validate_every == 0 else _NEVER
        if ended:
            self._begin(trainer, pl_module, batch_idx + 1)

    def _begin(self, trainer: Trainer, module: LightningModule, batches: int) -> None:
        """Prepares for the next step, before which the epoch had so many batches."""
        assert isinstance(module, LanguageModel)
        stage = self.ramp.at(trainer.global_step)
        together = self.micro_batch_size * module.topology.comm.size("data")
        trainer.accumulate_grad_batches = MicroBatches(stage.batch_size // together, batches)
        module.length = stage.sequence_length
