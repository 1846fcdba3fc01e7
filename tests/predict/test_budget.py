"""``comm.cac=auto``: the best that a budget allows, checked against every possibility."""

from itertools import product

import pytest

from tedlab.comm import Collective
from tedlab.predict.budget import within_budget
from tedlab.predict.volumes import ClosedForm
from tests.comm.test_ledger import configuration


def seconds(call: Collective) -> float:
    """Between nodes bytes cost ten times as much as inside; every call a little."""
    return 1.0 + call.wire_bytes * (10 if call.kind == "expert" else 1)


def form(**overrides: object) -> ClosedForm:
    return ClosedForm(configuration((8, 2, 2), {"comm.dtd": True, "model.layers": 2, **overrides}))


def cost(of: ClosedForm, entries: list[str]) -> tuple[int, float]:
    """Bytes kept, and what recomputation still takes."""
    blocks = range(of.config.model.layers)
    size = sum(of.kept_bytes(block, entries) for block in blocks)
    return size, sum(seconds(call) for block in blocks for call in of.recompute(block, entries))


def possibilities(of: ClosedForm) -> list[tuple[int, float]]:
    places = [f"{block}/{site.tag}" for block in range(of.config.model.layers) for site in of.sites[block].recomputed]
    suffixes = product(("", ":shard", None), repeat=len(places))
    return [cost(of, [p + s for p, s in zip(places, chosen, strict=True) if s is not None]) for chosen in suffixes]


def test_no_other_choice_within_the_budget_is_faster() -> None:
    of = form()
    everything = possibilities(of)
    largest = max(size for size, _ in everything)
    times = []
    for budget in (0, 1, largest // 10, largest // 3, largest // 2, largest):
        size, time = cost(of, within_budget(of, budget, seconds))
        assert size <= budget
        assert time == pytest.approx(min(t for s, t in everything if s <= budget))
        times.append(time)
    assert times == sorted(times, reverse=True)
    assert times[-1] == 0.0
    assert times[0] > 0.0


def test_forty_layers_are_soon_decided() -> None:
    of = form(**{"model.layers": 40})
    everything, _ = cost(of, within_budget(of, 1 << 60, seconds))
    size, time = cost(of, within_budget(of, everything // 4, seconds))
    assert everything // 5 < size <= everything // 4
    assert 0 < time < cost(of, [])[1]
