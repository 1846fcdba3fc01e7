"""The position of a run in its data, from which another run can continue with any batch size and layout."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """A run has read the first ``offset`` samples in the order of ``epoch``, which counts from 0.

    An epoch ends where it has fewer samples left than a step takes; smaller steps can read on from there.
    """

    epoch: int = 0
    offset: int = 0

    def steps_left(self, batch_size: int, samples: int) -> int:
        """Returns how many steps of ``batch_size`` samples this epoch has left, in a data set of ``samples``."""
        return (samples - self.offset) // batch_size

    def after(self, steps: int, batch_size: int, samples: int) -> "Position":
        """Returns the position after ``steps``; at a boundary, the end of an epoch, not the start of the next."""
        left = self.steps_left(batch_size, samples)
        if steps <= left:
            return Position(self.epoch, self.offset + steps * batch_size)
        epochs, before = divmod(steps - left - 1, samples // batch_size)
        return Position(self.epoch + 1 + epochs, (before + 1) * batch_size)

    def of_next_step(self, batch_size: int, samples: int) -> "Position":
        """Returns this position, or the beginning of the next epoch if this one has no whole step left."""
        return self if self.steps_left(batch_size, samples) else Position(self.epoch + 1)
