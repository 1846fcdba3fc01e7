"""Finds where the code of a LightningModule, or of a callback, may read or change ``.grad``.

Gradients are then gathered for it, which costs an all-gather per step and the memory of all gradients. If nobody reads
them there is no cost. A class that overrides such a hook for another purpose sets ``reads_grad = False``.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

MANUAL = "training_step"  # may read ``.grad`` in manual optimization
_OF_MODULES = ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "backward")
_OF_CALLBACKS = ("on_after_backward", "on_before_optimizer_step")


def hooks_that_read(trainer: Trainer) -> frozenset[str]:
    """Returns the names of hooks that the module or a callback overrides and that may read ``.grad``."""
    module = trainer.lightning_module
    found = {hook for hook in _OF_MODULES if _reads(module, hook, LightningModule)}
    if not module.automatic_optimization and getattr(module, "reads_grad", True):
        found.add(MANUAL)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        found |= {hook for hook in _OF_CALLBACKS if _reads(callback, hook, Callback)}
    return frozenset(found)


def _reads(instance: Any, hook: str, base: type) -> bool:
    return getattr(instance, "reads_grad", True) and is_overridden(hook, instance, base)
