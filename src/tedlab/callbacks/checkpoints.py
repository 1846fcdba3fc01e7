"""Saves checkpoints after a fixed number of steps, never later."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from tedlab._compat.lightning import count_as_saved, save_now


class StepCheckpoint(ModelCheckpoint):
    """Saves a checkpoint every ``every`` steps and keeps the newest ``save_top_k``.

    Lightning's own class needs a metric to keep more than one. With a metric it postpones a save whenever an epoch
    ends with the step, until the next validation, which may be many steps later.

    Args:
        every: Number of optimizer steps between checkpoints.
        arguments: Arguments of ``ModelCheckpoint``, except those that say when to save.
    """

    def __init__(self, every: int, **arguments: Any) -> None:
        super().__init__(**arguments, monitor="step", mode="max", every_n_train_steps=every)
        self.every = every

    @property
    @override
    def state_key(self) -> str:
        # Checkpoints hold the key of ModelCheckpoint, which this class replaced.
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        count_as_saved(self, trainer.global_step)  # the checkpoint that the run resumed from exists already

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            save_now(self, trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does nothing: no save was postponed."""

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does nothing: no save was postponed."""

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does nothing: :func:`tedlab.run.run` saves the end of a run, and a certificate has no use for it."""
