"""The expected rows of the busiest process, compared with all outcomes where these can be listed, and with draws."""

from itertools import combinations, product

import numpy as np
import pytest

from tedlab.config import AssumedRouting
from tedlab.errors import UsageError
from tedlab.predict.serve.load import expected_load, shares_of


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
def test_the_load_of_few_tokens_is_near_that_of_all_outcomes(case: tuple[int, int, int, int]) -> None:
    load, (most, busy) = expected_load(*case), listed(*case)
    assert load.mean == case[0] * case[1] / case[3]
    assert load.most == pytest.approx(most, rel=0.1)
    assert load.busy == pytest.approx(busy, rel=1e-12)


@pytest.mark.parametrize(
    ("case", "off"),
    [((16, 2, 8, 8), 0.03), ((64, 8, 64, 8), 0.01), ((2048, 2, 8, 4), 0.004), ((512, 6, 64, 16), 0.006)],
)
def test_the_load_of_many_tokens_is_that_of_draws(case: tuple[int, int, int, int], off: float) -> None:
    tokens, top_k, experts, processes = case
    generator = np.random.default_rng(0)
    draws = 4_000_000 // (tokens * experts)
    chosen = generator.random((draws, tokens, experts)).argsort(-1)[..., :top_k] * processes // experts
    loads = np.stack([(chosen == process).sum((1, 2)) for process in range(processes)], 1)
    assert expected_load(*case).most == pytest.approx(loads.max(1).mean(), rel=off)


def test_what_is_chosen_more_often_is_busier_and_no_token_chooses_an_expert_twice() -> None:
    skewed = expected_load(1000, 2, 8, 4, [8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert skewed.most > expected_load(1000, 2, 8, 4).most
    # The first expert would get 1,000 · 2 · 8/19 rows, the second half of that: 1,263.2 in the mean, with a deviation
    # of sqrt(8/7 · 1000 · (0.842 · 0.158 + 0.421 · 0.579)): far above the others.
    assert skewed.most == pytest.approx(1000 * 24 / 19, abs=0.01)
    everyone = expected_load(1000, 2, 8, 4, [1e9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert everyone.most == pytest.approx(1000 + 1000 / 7, abs=0.01)
    assert expected_load(10, 4, 4, 4).most == 10  # all choose all
    assert expected_load(10, 4, 4, 1).most == 40


def test_a_routing_that_is_not_known_is_refused() -> None:
    assert shares_of(AssumedRouting(), 4) is None
    assert shares_of(AssumedRouting("zipf", 1.0), 4) == [1, 1 / 2, 1 / 3, 1 / 4]
    with pytest.raises(UsageError, match=r"sim\.routing=trace is not known for inference"):
        shares_of(AssumedRouting("trace", trace="file"), 4)
    with pytest.raises(UsageError, match="go together"):
        shares_of(AssumedRouting("zipf"), 4)
