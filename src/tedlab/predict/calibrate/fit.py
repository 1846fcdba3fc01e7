"""Fits straight lines to timings: seconds = latency + amount / rate."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Series:
    """Timings of one kind of work.

    Attributes:
        name: The name of the work.
        unit: The unit of the amounts: FLOP, B (bytes) or s.
        how: A description of how it was measured.
        amounts: The amount of work in one operation, for each timing.
        seconds: The seconds that one operation took, as the mean over processes.
    """

    name: str
    unit: str
    how: str
    amounts: Sequence[float]
    seconds: Sequence[float]


@dataclass(frozen=True)
class Table(Series):
    """Timings of one kernel by size, which is not always the amount of work.

    Attributes:
        sizes: The size of each timing, see :class:`tedlab.predict.cluster.KernelTable`, which has the others as well.
    """

    sizes: Sequence[float]
    width: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Line:
    """The α–β model of a series.

    Attributes:
        latency: Seconds that do not depend on the amount (α).
        rate: Amount per second (1/β).
    """

    latency: float
    rate: float

    def seconds(self, amount: float) -> float:
        """Returns the seconds that an operation with this amount of work takes."""
        return self.latency + amount / self.rate


def fit(series: Series) -> Line:
    """Fits a line by least squares of *relative* errors, so that small amounts count as much as large ones.

    If the best line has a negative latency or rate, the best line through the origin takes its place.
    """
    amounts, seconds = np.array(series.amounts, dtype=float), np.array(series.seconds, dtype=float)
    latency, slope = 0.0, 0.0
    if len(amounts) > 1:
        columns = np.stack([1 / seconds, amounts / seconds], axis=1)
        latency, slope = np.linalg.lstsq(columns, np.ones(len(amounts)), rcond=None)[0]
    if latency <= 0 or slope <= 0:
        ratio = amounts / seconds
        latency, slope = 0.0, ratio.sum() / (ratio**2).sum()
    return Line(float(latency), float(1 / slope))


def largest_error(series: Series, line: Line) -> float:
    """Returns the largest relative error of the line over the timings."""
    return max(abs(line.seconds(a) / s - 1) for a, s in zip(series.amounts, series.seconds, strict=True))


def largest_ratio(series: Series, line: Line) -> float:
    """Returns the largest factor, 1 at least, between the line and a timing: half of it is as far off as twice."""
    ratios = [line.seconds(a) / s for a, s in zip(series.amounts, series.seconds, strict=True)]
    return max(max(ratio, 1 / ratio) for ratio in ratios)
