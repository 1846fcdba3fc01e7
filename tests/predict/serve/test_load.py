"""The expected rows of the busiest process, compared with all outcomes where these can be listed, and with draws."""

from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
import pytest

from tedlab.config import AssumedRouting
from tedlab.errors import UsageError
from tedlab.predict.serve.load import Replicas, _chances, expected_load, shares_of


def listed(tokens: int, top_k: int, experts: int, processes: int) -> tuple[float, float]:
    """Rows of the busiest process and busy experts of a process, over all that tokens may choose."""
    most, busy, outcomes = 0, 0, 0
    for chosen in product(combinations(range(experts), top_k), repeat=tokens):
        flat = [expert for choice in chosen for expert in choice]
        most += max(np.bincount([expert * processes // experts for expert in flat], minlength=processes))
        busy += len(set(flat))
        outcomes += 1
    return most / outcomes, busy / outcomes / processes


@pytest.mark.parametrize(
    "case", [(1, 1, 4, 4), (1, 2, 4, 2), (2, 1, 4, 4), (3, 2, 4, 2), (4, 2, 4, 4), (5, 1, 8, 4), (3, 3, 6, 3)]
)
def test_the_load_of_few_tokens_is_that_of_all_outcomes(case: tuple[int, int, int, int]) -> None:
    load, (most, busy) = expected_load(*case), listed(*case)
    assert load.mean == case[0] * case[1] / case[3]
    exact = case[0] == 1 or case[1] == 1
    assert load.most == pytest.approx(most, rel=1e-6 if exact else 0.005)
    assert load.busy == pytest.approx(busy, rel=1e-12)


def drawn(tokens: int, top_k: int, shares: Sequence[float], processes: int, draws: int) -> np.ndarray:
    """Rows of each process (draws, processes): tokens choose systematically along experts in random order."""
    experts = len(shares)
    generator, chances = np.random.default_rng(0), _chances(top_k, np.asarray(shares, dtype=float))
    order = generator.random((draws, tokens, experts)).argsort(-1)
    until = chances[order].cumsum(-1) - generator.random((draws, tokens, 1))
    hits = np.diff(np.floor(until + 1e-9), axis=-1, prepend=-1.0) > 0  # the first may be hit, too
    process = np.where(hits, order * processes // experts, processes)
    return np.stack([(process == each).sum((1, 2)) for each in range(processes)], 1)


@pytest.mark.parametrize(
    ("case", "zipf", "draws", "off"),  # off: three deviations of the mean of so many draws, at least
    [
        ((16, 2, 8, 8), 0, 4000, 0.008),
        ((64, 1, 128, 128), 0, 1200, 0.02),
        ((64, 8, 256, 256), 0, 300, 0.022),
        ((16, 8, 256, 64), 0, 1000, 0.015),
        ((128, 6, 160, 160), 0, 200, 0.024),
        ((2048, 2, 8, 4), 0, 200, 0.004),
        ((512, 6, 64, 16), 0, 100, 0.011),
        ((16, 2, 8, 8), 1.0, 4000, 0.012),
        ((8, 8, 64, 16), 0.5, 2000, 0.016),
        # One or two tokens of unequal experts choose two of a process more or less often than is known here.
        ((1, 2, 8, 4), 1.5, 4000, 0.2),
        ((1, 3, 8, 4), 2.0, 4000, 0.05),
        ((1, 8, 128, 32), 1.5, 2000, 0.05),
        ((2, 2, 8, 4), 2.0, 4000, 0.07),
        ((4, 3, 8, 4), 2.0, 2000, 0.04),
        ((4, 4, 32, 8), 1.0, 2000, 0.04),
    ],
)
def test_the_load_is_that_of_draws(case: tuple[int, int, int, int], zipf: float, draws: int, off: float) -> None:
    tokens, top_k, experts, processes = case
    shares = [rank**-zipf for rank in range(1, experts + 1)]
    most = drawn(tokens, top_k, shares, processes, draws).max(1)
    assert 3 * most.std() / np.sqrt(draws) < off * most.mean()
    assert expected_load(*case, shares if zipf else None).most == pytest.approx(most.mean(), rel=off)


def test_replicas_wait_in_every_layer_or_after_the_last() -> None:
    case = (16, 2, 8, 4)
    rows = drawn(16, 2, [1.0] * 8, 4, 23_400)
    in_layer = rows.reshape(-1, 2 * 4).max(1)
    assert expected_load(*case, replicas=Replicas(together=2)).most == pytest.approx(in_layer.mean(), rel=0.006)
    after_six = rows.max(1).reshape(-1, 3, 6).sum(2).max(1) / 6
    slowest = expected_load(*case, replicas=Replicas(apart=3, layers=6)).most
    assert slowest == pytest.approx(after_six.mean(), rel=0.006)
    assert expected_load(*case).most < 0.97 * slowest


def test_equal_shares_are_equally_likely() -> None:
    assert expected_load(40, 4, 16, 8, [0.25] * 16).most == pytest.approx(expected_load(40, 4, 16, 8).most, rel=1e-9)
    large = (8192, 4, 16, 8)
    assert expected_load(*large, [2.0] * 16).most == pytest.approx(expected_load(*large).most, rel=1e-9)


def test_what_is_chosen_more_often_is_busier_and_no_token_chooses_an_expert_twice() -> None:
    skewed = expected_load(1000, 2, 8, 4, [8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert skewed.most > expected_load(1000, 2, 8, 4).most
    # The first expert would get 1,000 · 2 · 8/19 rows, the second half of that: 1,263.2 in the mean, with a deviation
    # of sqrt(8/7 · 1000 · (0.842 · 0.158 + 0.421 · 0.579)): far above the others.
    assert skewed.most == pytest.approx(1000 * 24 / 19, rel=5e-4)
    everyone = expected_load(1000, 2, 8, 4, [1e9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert everyone.most == pytest.approx(1000 + 1000 / 7, rel=5e-4)
    assert expected_load(10, 4, 4, 4).most == 10  # all choose all
    assert expected_load(10, 4, 4, 1).most == 40


def test_a_routing_that_is_not_known_is_refused() -> None:
    assert shares_of(AssumedRouting(), 4) is None
    assert shares_of(AssumedRouting("zipf", 1.0), 4) == [1, 1 / 2, 1 / 3, 1 / 4]
    with pytest.raises(UsageError, match=r"sim\.routing=trace is not known for inference"):
        shares_of(AssumedRouting("trace", trace="file"), 4)
    with pytest.raises(UsageError, match="go together"):
        shares_of(AssumedRouting("zipf"), 4)
