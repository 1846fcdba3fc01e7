"""How many rows the busiest of the processes that share experts is expected to get, and how many experts have any.

A mean hides what a pass waits for: its busiest process. For N tokens that choose K of E experts each, an expert that a
token chooses with the probability p gets N·p rows, with the variance N·p·(1-p)·E/(E-1). The rows of a process's experts
are taken to be normal with the sums of these, independent of those of the other processes. For equally likely experts
this is the limit of many tokens: variances are so large because the rows of all processes add up to N·K, and normal
variables that depend on each other only by their sum have the same expected maximum as independent ones of that
variance (their deviations from their mean).
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from tedlab.config import AssumedRouting
from tedlab.errors import UsageError

_STEPS = 4001  # of the integral, whose error is then below 1e-6 of a standard deviation


class Load(NamedTuple):
    """What a process of an expert group is expected to get.

    Attributes:
        mean: Rows of a process in the mean over processes.
        most: Rows of the busiest.
        busy: Experts of a process that any token chooses.
    """

    mean: float
    most: float
    busy: float

    @property
    def ratio(self) -> float:
        """The busiest over the mean."""
        return self.most / self.mean


def expected_load(tokens: int, top_k: int, experts: int, processes: int, shares: Sequence[float] | None = None) -> Load:
    """Returns the expected load.

    Args:
        tokens: The number N of tokens that choose, at least one.
        top_k: The number K of experts that each chooses.
        experts: The number E of experts, a multiple of ``processes``, which have as many consecutive ones each.
        processes: The number of processes that divide them.
        shares: (E,) proportions in which tokens choose experts; None: all are equally likely.
    """
    chance_E = _chances(top_k, np.ones(experts) if shares is None else np.asarray(shares, dtype=float))
    busy = float((1 - (1 - chance_E) ** tokens).sum()) / processes
    mean = tokens * top_k / processes
    if processes == 1:
        return Load(mean, mean, busy)
    mean_P = tokens * chance_E.reshape(processes, -1).sum(1)
    variance_P = tokens * (chance_E * (1 - chance_E)).reshape(processes, -1).sum(1) * experts / (experts - 1)
    deviation_P = np.sqrt(np.maximum(variance_P, 1e-12))
    if shares is None:
        most = mean + deviation_P[0] * _most_of_standard(processes)
    else:
        most = _expected_maximum(mean_P, deviation_P)
    room = tokens * min(top_k, experts // processes)
    return Load(mean, float(np.clip(most, max(np.ceil(mean), mean_P.max()), room)), busy)


def _expected_maximum(mean_P: np.ndarray, deviation_P: np.ndarray) -> float:
    """Returns the expected maximum of independent normal variables, by integration of its distribution."""
    x = np.linspace((mean_P - 8 * deviation_P).min(), (mean_P + 8 * deviation_P).max(), _STEPS)
    below = torch.special.ndtr(torch.from_numpy((x[:, None] - mean_P) / deviation_P)).numpy().prod(1)
    return float(x[-1] - np.trapezoid(below, x))


@cache
def _most_of_standard(number: int) -> float:
    return _expected_maximum(np.zeros(number), np.ones(number))


def shares_of(assumed: AssumedRouting, experts: int) -> list[float] | None:
    """Returns the proportions in which experts are chosen; None: all equally often.

    Raises:
        UsageError: If the routing is none of those that a plan of inference knows.
    """
    if (assumed.routing == "zipf") != (assumed.zipf is not None):
        raise UsageError("sim.routing=zipf and sim.zipf=… go together")
    if assumed.routing not in (None, "balanced", "zipf"):
        raise UsageError(f"sim.routing={assumed.routing} is not known for inference; valid: balanced, zipf")
    exponent = assumed.zipf
    return None if exponent is None else [rank**-exponent for rank in range(1, experts + 1)]


def _chances(top_k: int, shares_E: np.ndarray) -> np.ndarray:
    """Returns the probabilities that a token chooses each expert: proportional to shares, but at most 1."""
    chance_E = np.zeros(len(shares_E))
    free = np.ones(len(shares_E), dtype=bool)
    while True:
        chance_E[free] = (top_k - (~free).sum()) * shares_E[free] / shares_E[free].sum()
        if not (chance_E > 1).any():
            return chance_E
        free &= chance_E <= 1
        chance_E[~free] = 1.0
