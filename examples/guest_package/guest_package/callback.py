"""A callback: how far apart the losses of a run were, in a file of the run directory."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class LossSpread(Callback):
    """``callbacks.NAME._target_=guest_package.callback.LossSpread``."""

    def __init__(self) -> None:
        self.losses: list[Any] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["train/loss"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            losses = [float(loss) for loss in self.losses]
            spread = {"lowest": min(losses), "highest": max(losses), "micro_batches": len(losses)}
            (Path(trainer.default_root_dir) / "loss_spread.json").write_text(json.dumps(spread))
