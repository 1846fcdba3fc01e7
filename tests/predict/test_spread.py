"""Predicted times have a range, whose factor is worked by hand here, and layouts within it are not told apart."""

from dataclasses import replace

import pytest

from tedlab.predict.cluster import load_cluster
from tedlab.predict.spread import PUBLISHED, Spread, spread_of, spread_on
from tests.predict.test_estimate import closed_form


def test_two_of_three_ratios_are_within_the_factor_however_gross_a_miss_is() -> None:
    assert spread_of([1.1, 1 / 1.2, 1.0, 5.0]) == pytest.approx(1.2)  # sorted: 1, 1.1, 1.2, 5; the third of four
    assert spread_of([1.5]) == pytest.approx(1.5)
    assert spread_of([1.0, 1.21]) == pytest.approx(1.21 ** (2 / 3))  # two thirds of the way, in the logarithm


def test_a_time_is_said_with_its_range() -> None:
    assert Spread(1.15, "").said(12.3) == "12.3 s (10.7 to 14.1)"
    assert Spread(1.0001, "").said(25.32) == "25.32 s (25.32 to 25.32)"  # and not 25.3 to 25.3, which it is not in
    assert Spread(1.01, "").said(25.32) == "25.32 s (25.1 to 25.6)"
    assert Spread(1.17, "").said(1060.4) == "1060 s (906 to 1240)"
    assert Spread(1.0, "").said(12345.6) == "12350 s (12350 to 12350)"
    assert Spread(1.0, "").range(2.0) == (2.0, 2.0)


def test_an_estimate_says_its_time_with_the_range_and_its_memory() -> None:
    found = closed_form(["parallel.world_size=8", "data.batch_size=64"])
    low, high = found.step_seconds / PUBLISHED.factor, found.step_seconds * PUBLISHED.factor
    gib = f"{found.memory.total / 2**30:.2f}"
    assert str(found) == f"{found.step_seconds:.4g} s ({low:.3g} to {high:.3g}), {gib} GiB"


def test_times_within_the_factor_are_not_told_apart() -> None:
    spread = Spread(1.2, "")
    assert not spread.apart(1.0, 1.19)
    assert not spread.apart(1.19, 1.0)
    assert spread.apart(1.0, 1.21)
    assert spread.apart(1.21, 1.0)


def test_a_clusters_own_spread_comes_before_that_of_published_runs() -> None:
    cluster = load_cluster("dgx_h100")
    assert spread_on(cluster) is PUBLISHED
    assert spread_on(replace(cluster, spread=1.05)).factor == 1.05
    with pytest.raises(ValueError, match=r"spread is 0\.9; it is a factor of at least 1"):
        replace(cluster, spread=0.9)
