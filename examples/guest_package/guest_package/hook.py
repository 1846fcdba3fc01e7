"""A collective hook, which a callback registers: bytes by kind of group, in a file of the run directory."""

import json
from collections import Counter
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from tedlab.comm import Collective
from tedlab.strategy import TEDStrategy


class BytesByGroup(Callback):
    """``callbacks.NAME._target_=guest_package.hook.BytesByGroup``."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer.strategy, TEDStrategy)
        trainer.strategy.topology.comm.register_hook(self.hear)

    def hear(self, call: Collective, event: Literal["start", "end"]) -> None:
        """Counts a collective of this process when it ends."""
        if event == "end":
            self.bytes[call.kind] += call.shape.numel() * call.dtype.itemsize

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / "bytes_by_group.json").write_text(json.dumps(self.bytes))
