"""How far a predicted time may be from a measured one, and where that is known from.

A factor f stands for it: two of three of the cases that it was found by took t / f to t · f seconds where t were
predicted. Like the median of the errors, it is not widened by a few gross misses. The cases are published runs, the
lines of a calibration, or a user's own runs (docs/truth.md).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tedlab.predict.cluster import ClusterConfig


@dataclass(frozen=True)
class Spread:
    """A factor for predicted times.

    Attributes:
        factor: At least 1.
        source: What it is known by.
    """

    factor: float
    source: str

    def range(self, seconds: float) -> tuple[float, float]:
        """Returns the shortest and the longest time of the range."""
        return seconds / self.factor, seconds * self.factor

    def ends(self, seconds: float) -> str:
        """Returns the range as text: ``10.6 to 14.3``. A range so narrow that it needs them has the value's digits."""
        for digits in (3, 4):
            low, high = (_written(end, digits) for end in self.range(seconds))
            if float(low) <= float(_written(seconds, 4)) <= float(high):
                break
        return f"{low} to {high}"

    def said(self, seconds: float) -> str:
        """Returns a time with its range: ``12.3 s (10.6 to 14.3)``."""
        return f"{_written(seconds, 4)} s ({self.ends(seconds)})"

    def apart(self, one: float, other: float) -> bool:
        """Tells whether of two predicted times one is surely the longer: their ratio is more than the factor."""
        return max(one, other) > self.factor * min(one, other)


def _written(seconds: float, digits: int) -> str:
    """Returns a number with so many digits, without an exponent up to a million."""
    return f"{float(f'{seconds:.{digits}g}'):g}"


# benchmarks.published finds it for its rows of today's software; a test compares the two.
PUBLISHED = Spread(1.11, "the errors of published runs (docs/truth.md)")


def spread_on(cluster: ClusterConfig) -> Spread:
    """Returns the spread of predictions for a cluster: that of its file if it has one, otherwise of published runs."""
    return PUBLISHED if cluster.spread is None else Spread(cluster.spread, "the errors that this cluster's file gives")


def spread_of(ratios: Iterable[float]) -> float:
    """Returns the factor within which two of three predicted times are of measured ones.

    Args:
        ratios: Predicted by measured times, in any order; one at least.
    """
    off = sorted(abs(math.log(ratio)) for ratio in ratios)
    place = 2 / 3 * (len(off) - 1)
    below = int(place)
    above = min(below + 1, len(off) - 1)
    return math.exp(off[below] + (place - below) * (off[above] - off[below]))
