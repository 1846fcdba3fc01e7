"""What each optimizer step takes: how many samples, and in pieces of which length (``data.ramp``)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tedlab.config import DataConfig
from tedlab.data.position import Position


class Stage(NamedTuple):
    """Consecutive steps that take the same.

    Attributes:
        until: The first step after them; None: they last to the end.
        batch_size: Samples of a step, over all data ranks and micro-batches.
        sequence_length: Inputs of a row of a micro-batch; it divides the number of inputs of a sample.
    """

    until: int | None
    batch_size: int
    sequence_length: int


class Ramp:
    """The stages of a run, by optimizer steps, which count from 0 whatever the layout is and wherever a run resumes.

    Args:
        stages: The stages in order, of which the last has no end.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)

    @classmethod
    def of(cls, data: DataConfig, sequence_length: int) -> "Ramp":
        """Returns the stages of a configuration; the last has ``data.batch_size`` and the whole length of a sample."""
        size, length = data.batch_size, sequence_length
        before = [Stage(s.until, s.batch_size or size, s.sequence_length or length) for s in data.ramp]
        return cls([*before, Stage(None, size, length)])

    def at(self, step: int) -> Stage:
        """Returns the stage of a step."""
        return next(stage for stage in self.stages if stage.until is None or step < stage.until)

    def between(self, first: int, last: int) -> Iterator[tuple[Stage, int]]:
        """Yields the stages of the steps from ``first`` up to, without, ``last``, and how many of these each has."""
        while first < last:
            stage = self.at(first)
            end = last if stage.until is None else min(last, stage.until)
            yield stage, end - first
            first = end

    def samples(self, first: int, last: int) -> int:
        """Returns how many samples the steps from ``first`` up to, without, ``last`` take; 0 if that is before."""
        return sum(steps * stage.batch_size for stage, steps in self.between(first, last))

    def tokens(self, first: int, last: int, sample: int) -> int:
        """Returns how many tokens the steps from ``first`` up to, without, ``last`` read, ``sample`` of each sample."""
        return self.samples(first, last) * sample

    def after(self, start: Position, first: int, last: int, samples: int) -> Position:
        """Returns the position after the steps from ``first``, which begins at ``start``, up to, without, ``last``.

        See :meth:`Position.after` for what it is at the end of an epoch.
        """
        for stage, steps in self.between(first, last):
            start = start.after(steps, stage.batch_size, samples)
        return start

    def epoch_ends(self, start: Position, first: int, samples: int) -> int:
        """Returns the first step, from ``first`` on, which begins at ``start``, for which the epoch has too little."""
        while True:
            stage = self.at(first)
            left = start.steps_left(stage.batch_size, samples)
            if stage.until is None or left < stage.until - first:
                return first + left
            start = Position(start.epoch, start.offset + (stage.until - first) * stage.batch_size)
            first = stage.until
