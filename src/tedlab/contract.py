"""What of Lightning needs care under TEDStrategy, or does not go with it, and why. All of it: docs/lightning.md."""

import copy

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging


def prepare(trainer: Trainer) -> None:
    """Called once the model is built and on its device."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            # It copied the module before ``configure_model`` made the layers, and would average only what was there.
            callback._average_model = copy.deepcopy(trainer.lightning_module)
