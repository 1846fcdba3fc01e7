"""Where in the data a run is, so that another one can go on there with whatever batch and layout it has."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """Of the order of ``epoch``, from 0, the first ``offset`` samples have been read.

    An epoch ends where it has fewer samples left than a step takes; smaller steps can read on from there.
    """

    epoch: int = 0
    offset: int = 0

    def steps_left(self, batch_size: int, samples: int) -> int:
        """Steps of ``batch_size`` samples until the end of this epoch, of a data set of so many samples."""
        return (samples - self.offset) // batch_size

    def after(self, steps: int, batch_size: int, samples: int) -> "Position":
        """Where so many steps lead; the end of an epoch, not the beginning of the next."""
        left = self.steps_left(batch_size, samples)
        if steps <= left:
            return Position(self.epoch, self.offset + steps * batch_size)
        epochs, before = divmod(steps - left - 1, samples // batch_size)
        return Position(self.epoch + 1 + epochs, (before + 1) * batch_size)

    def of_next_step(self, batch_size: int, samples: int) -> "Position":
        """Here, or the beginning of the next epoch if there is no room for a step here."""
        return self if self.steps_left(batch_size, samples) else Position(self.epoch + 1)
