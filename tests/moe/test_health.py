"""Router health in numbers computed by hand."""

import math

import pytest
import torch

from tedlab.moe import RouterReport, relative_load, router_health

VALUES = ("load_cv", "max_violation", "entropy", "dead_experts", "dropped_fraction", "balance_loss", "z_loss")
BALANCED, UNEVEN, COLLAPSED = [10, 10, 10, 10], [30, 10, 0, 0], [40, 0, 0, 0]


def routers(*loads: list[int]) -> RouterReport:
    """Layer l drops 2·l choices, and has the losses 1 + l and 10·l."""
    number = torch.arange(len(loads)).double()
    return RouterReport(1 + number, 10 * number, torch.tensor(loads).double(), 2 * number)


def test_values_of_one_layer_by_hand() -> None:
    assert router_health(routers(UNEVEN)) == pytest.approx(
        {
            "load_cv": math.sqrt((20**2 + 0 + 10**2 + 10**2) / 4) / 10,
            "max_violation": 2.0,
            "entropy": math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))) / 4,
            "dead_experts": 0.5,
            "dropped_fraction": 0.0,
            "balance_loss": 1.0,
            "z_loss": 0.0,
        },
        rel=1e-12,
    )


@pytest.mark.parametrize(("load", "values"), [(BALANCED, [0, 0, 1, 0]), (COLLAPSED, [math.sqrt(3), 3, 0.25, 0.75])])
def test_the_best_and_the_worst_load(load: list[int], values: list[float]) -> None:
    health = router_health(routers(load))
    assert [health[name] for name in VALUES[:4]] == pytest.approx(values, rel=1e-12)


def test_layers_are_averaged_over_the_run_and_over_thirds() -> None:
    health = router_health(routers(BALANCED, UNEVEN, COLLAPSED, COLLAPSED))
    assert health["max_violation"] == (0 + 2 + 3 + 3) / 4
    assert health["early/max_violation"] == (0 + 2) / 2  # the first group is the larger one
    assert health["middle/max_violation"] == health["late/max_violation"] == 3
    assert health["dropped_fraction"] == pytest.approx((0 + 2 + 4 + 6) / 4 / 40)
    assert health["late/balance_loss"] == 4
    assert health["late/z_loss"] == 30


@pytest.mark.parametrize(
    ("layers", "groups"),
    [(1, []), (2, ["early", "late"]), (3, ["early", "middle", "late"]), (40, ["early", "middle", "late"])],
)
def test_the_number_of_keys_is_bounded(layers: int, groups: list[str]) -> None:
    health = router_health(routers(*[UNEVEN] * layers))
    assert list(health) == [prefix + name for prefix in ["", *(f"{group}/" for group in groups)] for name in VALUES]


def test_only_proportions_of_counts_matter() -> None:
    """So copies in tensor ranks need not be told from counts of their own."""
    once = routers(UNEVEN, COLLAPSED)
    thrice = once._replace(load=3 * once.load, dropped=3 * once.dropped)
    assert router_health(thrice) == pytest.approx(router_health(once), rel=1e-15)
    assert relative_load(thrice).tolist() == relative_load(once).tolist() == [[3, 1, 0, 0], [4, 0, 0, 0]]
