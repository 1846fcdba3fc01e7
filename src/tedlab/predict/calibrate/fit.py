"""Straight lines through timings: seconds = latency + amount / rate."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Series:
    """Timings of one kind of work.

    Attributes:
        name: of the work.
        unit: of amounts: FLOP or B.
        how: it was measured.
        amounts: of work in one operation.
        seconds: that it took, mean over processes.
    """

    name: str
    unit: str
    how: str
    amounts: Sequence[float]
    seconds: Sequence[float]


@dataclass(frozen=True)
class Line:
    """The α–β model of a series.

    Attributes:
        latency: seconds, the amount apart (α).
        rate: units per second (1/β).
    """

    latency: float
    rate: float

    def seconds(self, amount: float) -> float:
        """That so much work takes."""
        return self.latency + amount / self.rate


def fit(series: Series) -> Line:
    """The line with the least squares of *relative* errors, so that small amounts count as much as large ones.

    The latency is not negative: where that, or a rate that is, would fit better, the line goes through the origin.
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
    """The largest relative error of the line among the timings."""
    return max(abs(line.seconds(a) / s - 1) for a, s in zip(series.amounts, series.seconds, strict=True))
