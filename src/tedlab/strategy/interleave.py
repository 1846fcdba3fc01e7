"""The backward pass of a micro-batch, put off until the forward pass of the next (``comm.interleave``)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class DeferredBackward:
    """A backward pass that runs later.

    Attributes:
        backward: The pass.
        restore: Restores what the process knew of the micro-batch, such as its place in the run.
        finish: What follows the pass.
        modes: Whether each module was in training mode, as it must be where the pass computes again.
    """

    backward: Callable[[], object]
    restore: Callable[[], None]
    finish: Callable[[], None]
    modes: Mapping[nn.Module, bool]

    def run(self) -> None:
        """Runs the pass, once."""
        self.restore()
        self.backward()

    def run_alone(self, keep: Callable[[], Callable[[], None]]) -> None:
        """Runs the pass and what follows it between two training steps, whatever the process does at present.

        Args:
            keep: Notes what the process knows of its present micro-batch, and returns a function that restores it.
        """
        restore, modes = keep(), {module: module.training for module in self.modes}
        _set(self.modes)
        with torch.inference_mode(False), torch.enable_grad():
            self.run()
            self.finish()
        _set(modes)
        restore()


def _set(modes: Mapping[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training
