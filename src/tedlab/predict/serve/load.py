"""How many rows the busiest of the processes that share experts is expected to get, and how many experts have any.

A mean hides what a pass waits for: its busiest process. Rows of all processes add up to N·K for N tokens that choose K
of E experts each. We take the rows of a process to be binomial and independent of those of the others, except that
they add up to that; :func:`_spread` chooses the variance so that the dependent rows have the true one. If experts are
equally likely this is exact for one token, and for K = 1. Where listing all sums is too much, the probability of the
sum is that of a normal variable (Levin, "A representation for multinomial cumulative distribution functions", 1981).
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch

from tedlab.config import AssumedRouting
from tedlab.errors import UsageError

_LISTED = 1 << 18  # the most numbers by which sums are listed
_REACH = 12  # standard deviations above the mean that the busiest process is looked for in


class Load(NamedTuple):
    """What a process of an expert group is expected to get.

    Attributes:
        mean: Rows of a process in the mean over processes.
        most: Rows of the busiest of those that wait for each other.
        busy: Experts of a process that any token chooses.
    """

    mean: float
    most: float
    busy: float

    @property
    def ratio(self) -> float:
        """The busiest over the mean."""
        return self.most / self.mean


class Replicas(NamedTuple):
    """How replicas of all experts wait for each other.

    Attributes:
        together: Of how many the processes wait for each other in every layer.
        apart: How many such sets there are, which wait for each other after the last layer.
        layers: The layers with experts until then.
    """

    together: int = 1
    apart: int = 1
    layers: int = 1


_ONE = Replicas()


def expected_load(
    tokens: int,
    top_k: int,
    experts: int,
    processes: int,
    shares: Sequence[float] | None = None,
    replicas: Replicas = _ONE,
) -> Load:
    """Returns the expected load in a layer.

    Args:
        tokens: The number N of tokens that choose among the experts of a replica, at least one.
        top_k: The number K of experts that each chooses.
        experts: The number E of experts, a multiple of ``processes``, which have as many consecutive ones each.
        processes: The number of processes that divide them.
        shares: (E,) proportions in which tokens choose experts; None: all are equally likely.
        replicas: Other processes that have the same experts and as many tokens.
    """
    return _expected_load(tokens, top_k, experts, processes, None if shares is None else tuple(shares), replicas)


@lru_cache(10_000)  # a search asks for the same again and again
def _expected_load(
    tokens: int, top_k: int, experts: int, processes: int, shares: tuple[float, ...] | None, replicas: Replicas
) -> Load:
    chance_E = _chances(top_k, np.ones(experts) if shares is None else np.asarray(shares, dtype=float))
    busy = float((1 - (1 - chance_E) ** tokens).sum()) / processes
    mean = tokens * top_k / processes
    if processes == 1 or top_k == experts:
        return Load(mean, mean, busy)
    chance_PE = chance_E.reshape(processes, -1)
    mean_P = tokens * chance_PE.sum(1)
    variance_P = tokens * (chance_PE * (1 - chance_PE)).sum(1) * _spread(tokens, top_k, experts)
    room = tokens * min(top_k, experts // processes)
    reach_P = _REACH * (1 + np.sqrt(variance_P))
    lowest, highest = max(0, int((mean_P - reach_P).min())), min(room, int((mean_P + reach_P).max()))
    if shares is None:  # all processes are alike
        mean_P, variance_P = mean_P[:1], variance_P[:1]
    rows_X = np.arange(lowest, highest + 1)
    chance_PX = _binomial(rows_X, mean_P, variance_P)
    below_X = _all_below(rows_X, chance_PX, processes // len(chance_PX), tokens * top_k) ** replicas.together
    at_X = np.diff(below_X, prepend=0.0)
    most = float(at_X @ rows_X)
    deviation = float(np.sqrt(at_X @ (rows_X - most) ** 2))
    # The slowest of sets that run apart has the largest sum over layers.
    most += deviation / replicas.layers**0.5 * _most_of_standard(replicas.apart)
    return Load(mean, min(max(most, float(mean_P.max())), room), busy)


def _spread(tokens: int, top_k: int, experts: int) -> float:
    """Returns the factor on the variance of a process's independent rows that makes it true once the sum is known.

    If a sum of N·K chooses among M cells, as many of each expert, and none twice, an expert's rows are hypergeometric.
    With the M below their variance is that of tokens that choose without each other, N·K/E·(1-K/E); for K = 1 it is
    infinite.
    """
    rows = tokens * top_k
    # The share of the cells that are chosen, N·K / M.
    share = rows * (top_k - 1) / (rows * (experts - 1) - (experts - top_k)) if top_k > 1 else 0.0
    return (1 - share) / (1 - top_k / experts)


def _binomial(rows_X: np.ndarray, mean_P: np.ndarray, variance_P: np.ndarray) -> np.ndarray:
    """Returns the probabilities (P, X) of so many rows: two binomial laws, mixed so that mean and variance are given.

    Their numbers of trials are those below and above one that need not be whole.
    """
    trials_P1 = (mean_P / np.clip(1 - variance_P / mean_P, 1e-6, 1))[:, None]  # the most is as good as Poisson's law
    least_P1 = np.ceil(mean_P - 1e-9)[:, None]
    few_P1, many_P1 = (np.maximum(around(trials_P1), least_P1) for around in (np.floor, np.ceil))
    between_P1 = np.where(few_P1 < many_P1, 1 / few_P1 - 1 / many_P1, 1)
    share_P1 = np.clip((1 / trials_P1 - 1 / many_P1) / between_P1, 0, 1)
    chance_PX = sum(
        share * _of_trials(rows_X, trials, np.minimum(mean_P[:, None] / trials, 1))
        for share, trials in ((share_P1, few_P1), (1 - share_P1, many_P1))
    )
    return chance_PX / chance_PX.sum(1, keepdims=True)


def _of_trials(rows_X: np.ndarray, trials_P1: np.ndarray, chance_P1: np.ndarray) -> np.ndarray:
    """Returns the binomial probabilities (P, X) of so many rows in so many trials."""
    rows, misses, chance = map(torch.as_tensor, (rows_X, np.maximum(trials_P1 - rows_X, 0), chance_P1))
    log_PX = _log_factorial(trials_P1) - _log_factorial(rows_X) - _log_factorial(misses.numpy())
    log_PX += (torch.special.xlogy(rows, chance) + torch.special.xlog1py(misses, -chance)).numpy()
    return np.where(rows_X <= trials_P1, np.exp(log_PX), 0)


def _log_factorial(x: np.ndarray) -> np.ndarray:
    return torch.lgamma(torch.from_numpy(np.asarray(x) + 1.0)).numpy()


def _all_below(rows_X: np.ndarray, chance_PX: np.ndarray, alike: int, total: int) -> np.ndarray:
    """Returns the probability (X,) that no process has more than each of ``rows_X``, given the sum of all.

    Args:
        rows_X: Consecutive numbers of rows.
        chance_PX: Probabilities of these in different processes, if nothing were known of the others.
        alike: How many processes have each of these probabilities.
        total: The sum.
    """
    different, size = chance_PX.shape
    sums = different * alike * (size - 1) + 1
    if size * sums <= _LISTED:
        ways_XS = np.ones((size, sums // 2 + 1), dtype=complex)
        for chance_X in chance_PX:
            ways_XS *= np.fft.rfft(np.tril(np.ones((size, size))) * chance_X, sums, axis=1) ** alike
        given_X = np.fft.irfft(ways_XS, sums, axis=1)[:, total - different * alike * rows_X[0]]
        below_X = given_X / given_X[-1]
    else:
        within_PX = np.maximum(chance_PX.cumsum(1), 1e-300)
        mean_PX = (chance_PX * rows_X).cumsum(1) / within_PX
        square_PX = (chance_PX * rows_X.astype(float) ** 2).cumsum(1) / within_PX
        mean_X = alike * mean_PX.sum(0)
        variance_X = np.maximum(alike * (square_PX - mean_PX**2).sum(0), 1e-12)
        log_X = alike * np.log(within_PX).sum(0) - (total - mean_X) ** 2 / (2 * variance_X) - np.log(variance_X) / 2
        enough_X = rows_X * different * alike >= total
        below_X = np.where(enough_X, np.exp(np.minimum(0, log_X - log_X[-1])), 0)
    return np.clip(np.maximum.accumulate(below_X), 0, 1)


@cache
def _most_of_standard(number: int) -> float:
    """Returns the expected maximum of independent standard normal variables."""
    x = np.linspace(-8, 8, 4001)
    below = torch.special.ndtr(torch.from_numpy(x)).numpy() ** number
    return float(x[-1] - np.trapezoid(below, x))


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
