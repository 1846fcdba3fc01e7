"""The backward pass of a micro-batch, put off until the forward pass of the next (``comm.interleave``)."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class DeferredBackward:
    """A backward pass that runs later.

    Attributes:
        backward: The pass.
        restore: Restores what the process knew of the micro-batch, such as its place in the run.
        finish: What follows the pass.
    """

    backward: Callable[[], object]
    restore: Callable[[], None]
    finish: Callable[[], None]

    def run(self) -> None:
        """Runs the pass, once."""
        self.restore()
        self.backward()
