"""From how many rows on it is worth lending an expert: by hand, and as a configuration is completed with it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tedlab.config import with_values
from tedlab.predict.cluster import Slower, load_cluster
from tedlab.predict.lending import break_even_on, break_even_rows
from tedlab.predict.plan.lending import Comparison, compare_lending
from tedlab.predict.sim.routing import routing_of
from tedlab.validate import complete_simulated
from tests.certify.runs import composed


@pytest.mark.parametrize(
    ("flops", "bandwidth", "rows"),
    [(692e12, 370e9, 1247), (692e12, 48e9, 9612), (75e12, 3.8e9, 13158)],
    ids=["H200 in a node", "H200 between nodes", "Summit"],
)
def test_rows_worth_a_loan_are_those_whose_products_take_as_long_as_the_weights_travel(
    flops: float, bandwidth: float, rows: int
) -> None:
    assert break_even_rows(flops, bandwidth, itemsize=2) == rows
    weights = 3 * 2880 * 2880 * 2  # bytes of an expert of any size, with 2 FLOPs per number, row and product
    assert rows * 3 * weights / flops >= 2 * weights / bandwidth > (rows - 1) * 3 * weights / flops


def test_the_break_even_of_a_cluster_has_a_number_for_each_kind_of_link() -> None:
    cluster = load_cluster("dgx_h200")
    # 2 · 0.8 · 989e12 / (3 · 0.82 · 450e9), and / (3 · 0.6 · 400e9 / 8)
    assert break_even_on(cluster, "bf16-true", 2) == (1430, 17583)
    assert break_even_on(replace(cluster, between_nodes=None), "bf16-true", 2) == (1430, 1430)
    # Where all-to-alls were measured, at the rate of the largest: 2 · 0.8 · 989e12 / (3 · 313e9)
    assert break_even_on(load_cluster("dgx_h100"), "bf16-true", 2) == (1686, 17583)
    # Measured steps correct both: half the FLOP/s are worth half the rows, half the bytes/s twice as many.
    assert break_even_on(replace(cluster, slower=Slower(kernels=2)), "bf16-true", 2) == (715, 8792)
    assert break_even_on(replace(cluster, slower=Slower(collectives=2)), "bf16-true", 2) == (2859, 35165)


def compared(cluster: str, *overrides: str) -> Comparison:
    hardware = load_cluster(cluster)
    job = complete_simulated(composed("moe.dispatch=dropless", *overrides), hardware)
    routing = routing_of(job, "zipf", 1.2, None)
    assert routing is not None
    return compare_lending(job, hardware, routing)


PAPER_40B = (
    *("parallel.world_size=128", "model=gpt_6.7b", "moe=paper16", "parallel.tensor=4", "parallel.expert=16"),
    *("data.batch_size=1024", "data.micro_batch_size=1", "trainer.precision=16-true", "comm=ted"),
    "model.recompute.granularity=block",
)


def test_the_papers_model_does_not_lend_between_summits_nodes_but_over_nvlink_it_does() -> None:
    """2,048 rows of a micro-batch and Zipf's law: the hottest expert has 11,000 of 16 senders'."""
    summit = compared("summit", *PAPER_40B)
    assert not any(summit.lending.loans)
    assert not summit.pays
    assert summit.verdict().startswith("Do not lend")
    nvlink = compared("gb200_nvl72", *PAPER_40B, "data.micro_batch_size=4")  # which has the memory for it
    assert nvlink.pays
    assert nvlink.verdict().startswith("Lend: moe.lend.policy=llep lends")
    assert max(nvlink.lending.rows[0]) < max(nvlink.without.rows[0])
    assert max(nvlink.lending.peak_bytes) < max(nvlink.without.peak_bytes)
    said = " ".join((Path(__file__).parents[2] / "docs" / "llep.md").read_text().split())
    after, before = (
        (f"{outcome.step_seconds:.2f}", f"{max(outcome.peak_bytes) / 2**30:.1f}")
        for outcome in (nvlink.lending, nvlink.without)
    )
    assert f"it is to lend with micro-batches of four samples: predicted are {after[0]} s a step instead of " in said
    assert f" instead of {before[0]}, and {after[1]} GiB on the fullest rank instead of {before[1]}. With" in said
    assert "With micro-batches of one it is not to lend there either" in said
    assert compared("gb200_nvl72", *PAPER_40B).verdict().startswith("Do not lend")


def test_what_hides_behind_shared_experts_is_no_time_of_a_layer() -> None:
    one_node = ("parallel.world_size=8", "parallel.tensor=1", "parallel.expert=8", "model.layers=2")
    shared = (*PAPER_40B, *one_node, "moe.shared.experts=1")
    shown, hidden = (compared("dgx_h200", *shared, f"comm.overlap_shared={on}") for on in ("false", "true"))
    for before, after in ((shown.without, hidden.without), (shown.lending, hidden.lending)):
        assert before.rows == after.rows
        slowest, hiding = (sum(map(max, outcome.seconds)) for outcome in (before, after))
        assert hiding < slowest
        # The rest of a step is the same, and layers take as long as the slowest process.
        assert before.step_seconds - after.step_seconds == pytest.approx(slowest - hiding)


def test_a_comparison_has_every_ranks_load_memory_and_time(tmp_path: Path) -> None:
    found = compared("dgx_h200", *PAPER_40B, "parallel.world_size=8", "parallel.tensor=1", "parallel.expert=8")
    assert found.ranks == list(range(8))
    assert found.table().row_count == 8
    assert sum(found.lending.lent) == sum(found.lending.borrowed) == sum(found.lending.loans)
    found.save(tmp_path)
    saved = json.loads((tmp_path / "lending.json").read_text())
    assert saved["lending"]["rows"] == found.lending.rows
    assert len(saved["without"]["peak_bytes"]) == 8


def test_auto_becomes_the_numbers_of_the_cluster_that_a_simulation_is_for() -> None:
    job = composed(
        *("parallel=ep4", "moe.dispatch=dropless", "moe.lend.policy=llep", "trainer.precision=bf16-true"),
        "data.micro_batch_size=4",
    )
    lend = complete_simulated(job, load_cluster("dgx_h200")).moe.lend
    assert (lend.minimum, lend.ranks_per_node) == ([1430, 17583], 8)
    assert complete_simulated(job, load_cluster("summit")).moe.lend.ranks_per_node == 6
    given = with_values(job, {"moe.lend.minimum": 7, "moe.lend.ranks_per_node": 2})
    lend = complete_simulated(given, load_cluster("summit")).moe.lend
    assert (lend.minimum, lend.ranks_per_node) == ([7, 7], 2)
    off = with_values(job, {"moe.lend.policy": "none"})
    assert complete_simulated(off).moe.lend.minimum == "auto"
