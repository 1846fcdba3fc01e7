"""Records which experts tokens go to, and replays such a record."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from tedlab.callbacks.journal import log
from tedlab.moe import routes_own_tokens
from tedlab.moe.recording import Replay, RoutingRecorder
from tedlab.record import Recording, Shape, begin
from tedlab.strategy import TEDStrategy


class RecordRouting(Callback):
    """Writes ``routing/`` in the run directory, see :mod:`tedlab.record`.

    Args:
        directory: The directory of the record.
        shape: What the record is of.
    """

    def __init__(self, directory: Path, shape: Shape) -> None:
        self.directory, self.shape = directory, shape
        self._recorder: RoutingRecorder | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        topology = _strategy(trainer).topology
        if trainer.is_global_zero:
            begin(self.directory, self.shape, trainer.global_step)
        trainer.strategy.barrier("record of routing")
        # Tensor ranks route the same tokens, unless they divide the positions.
        if routes_own_tokens(pl_module) or topology.comm.rank("tensor") == 0:
            self._recorder = topology.context.recorder = RoutingRecorder(self.directory, trainer.global_rank)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._recorder is not None and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._recorder.save(trainer.global_step)


class ReplayRouting(Callback):
    """Makes routers choose as recorded, and logs ``router/flip_rate``, the share of choices of their own that differ.

    Args:
        directory: The directory of the record.
    """

    def __init__(self, directory: Path) -> None:
        self._replay = Replay(Recording(directory))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _strategy(trainer).topology.context.replay = self._replay

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        flips = self._replay.take_flips().mean()
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            log(trainer, {"router/flip_rate": trainer.strategy.reduce(flips).item()})


def _strategy(trainer: Trainer) -> TEDStrategy:
    assert isinstance(trainer.strategy, TEDStrategy)
    return trainer.strategy
