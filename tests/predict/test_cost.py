"""What collectives cost: computed by hand for a cluster of round figures, and what must hold for any."""

from dataclasses import replace
from typing import get_args

import pytest

from tedlab.comm.collectives import Operation
from tedlab.predict.cluster import (
    ClusterConfig,
    Efficiency,
    Link,
    MeasuredCollective,
    MeasuredRate,
    PeakFlops,
    cluster_names,
    load_cluster,
)
from tedlab.predict.cost import collective_seconds, link_of, wire_bytes_by_link

OPERATIONS = get_args(Operation)

# Two GPUs a node; inside it 10 GB/s a GPU, between nodes 2 GB/s a node; steps of 1 and 5 µs.
PAIRS = ClusterConfig(
    gpus_per_node=2,
    memory_bytes=16e9,
    memory_bandwidth=900e9,
    peak_flops=PeakFlops(fp64=1e12, fp32=1e12, fp16=1e12, bf16=1e12),
    in_node=Link(bandwidth=10e9, latency=1e-6),
    between_nodes=Link(bandwidth=2e9, latency=5e-6),
    efficiency=Efficiency(gemm=1, memory=1, in_node=1, between_nodes=1, all_to_all=0.5),
)
FOURS = replace(PAIRS, gpus_per_node=4)
SIXES = replace(PAIRS, gpus_per_node=6)
P = 12e6  # bytes


# ---- rings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "steps", "passed"), [("all_reduce", 6, 1.5), ("all_gather", 3, 0.75), ("reduce_scatter", 3, 0.75)]
)
def test_a_ring_of_four_inside_a_node(op: Operation, steps: int, passed: float) -> None:
    assert collective_seconds(op, P, range(4), FOURS) == pytest.approx(steps * 1e-6 + passed * P / 10e9)


def test_a_ring_inside_a_node_of_summit() -> None:
    """Four of six V100: 6 steps of 3.4 µs; 1.5 × 16 MiB at half of 50 GB/s."""
    expected = 6 * 3.4e-6 + 1.5 * 2**24 / 25e9
    assert collective_seconds("all_reduce", 2**24, range(4), load_cluster("summit")) == pytest.approx(expected)


def test_a_ring_over_two_nodes_leaves_each_once_and_has_the_network_of_both_members() -> None:
    """Ranks 0 1 | 2 3, one group: two steps inside, one between; all of the network's 2 GB/s, slower than the link."""
    expected = 2 * 1e-6 + 1 * 5e-6 + 0.75 * P / 2e9
    assert collective_seconds("all_gather", P, range(4), PAIRS) == pytest.approx(expected)


def test_rings_side_by_side_share_the_network() -> None:
    """Ranks 0 2 4 6 and 1 3 5 7 on pairs: one member a node, and two rings leave it."""
    expected = 2 * (3 * 5e-6 + 0.75 * P / (2e9 / 2))
    assert collective_seconds("all_reduce", P, range(0, 8, 2), PAIRS) == pytest.approx(expected)
    assert collective_seconds("all_reduce", P, range(1, 8, 2), PAIRS) == pytest.approx(expected)


def test_a_ring_is_as_fast_as_its_slowest_link() -> None:
    fast = replace(PAIRS, between_nodes=Link(bandwidth=40e9, latency=5e-6))
    assert collective_seconds("all_gather", P, range(4), fast) == pytest.approx(7e-6 + 0.75 * P / 10e9)


def test_a_ring_that_straddles_nodes_has_the_network_for_itself_where_its_siblings_stay_inside() -> None:
    """Fours on nodes of six: 0–3 | 4 5 · 6 7 | 8–11. Only the middle one leaves a node."""
    inside = 3 * 1e-6 + 0.75 * P / 10e9
    assert collective_seconds("all_gather", P, range(4), SIXES) == pytest.approx(inside)
    assert collective_seconds("all_gather", P, range(8, 12), SIXES) == pytest.approx(inside)
    assert collective_seconds("all_gather", P, range(4, 8), SIXES) == pytest.approx(7e-6 + 0.75 * P / 2e9)


def test_two_rings_that_straddle_the_two_ends_of_a_node_share_its_network() -> None:
    """Fives on nodes of six: 0–4 | 5–9 leaves node 0 and 1; 10–14 leaves node 1 and 2."""
    expected = 3 * 1e-6 + 5e-6 + 2 * 0.8 * P / 2e9
    assert collective_seconds("all_gather", P, range(5, 10), SIXES) == pytest.approx(expected)


# ---- all-to-all ----------------------------------------------------------------------------------------------------


def test_all_to_all_inside_a_node() -> None:
    assert collective_seconds("all_to_all", P, range(4), FOURS) == pytest.approx(1e-6 + 0.75 * P / 10e9)


def test_all_to_all_over_two_nodes_takes_the_longer_of_its_two_parts() -> None:
    """Ranks 0 1 | 2 3: a quarter of each buffer stays inside; two halves share 2 GB/s, of which half is reached."""
    expected = 5e-6 + (2 * P / 2) / (2e9 * 0.5)
    assert collective_seconds("all_to_all", P, range(4), PAIRS) == pytest.approx(expected)
    fast = replace(PAIRS, between_nodes=Link(bandwidth=2e12, latency=0.5e-6))
    assert collective_seconds("all_to_all", P, range(4), fast) == pytest.approx(1e-6 + 0.25 * P / 10e9)


def test_all_to_alls_side_by_side_share_the_network() -> None:
    """Summit, four GPUs of each node in use, tensor 4: the sixteen ranks of an expert group are on sixteen nodes."""
    summit = replace(load_cluster("summit"), gpus_per_node=4)
    expected = 9.6e-6 + 2**24 * 15 / 16 / (25e9 / 4 * 0.6)
    assert collective_seconds("all_to_all", 2**24, range(0, 64, 4), summit) == pytest.approx(expected)
    assert collective_seconds("all_to_all", 2**24, range(67, 128, 4), summit) == pytest.approx(expected)


# ---- rates that depend on the size of an all-to-all ----------------------------------------------------------------

SIZED = replace(
    FOURS,
    in_node=Link(10e9, 1e-6, [MeasuredRate(1e6, 2e9), MeasuredRate(4e6, 4e9), MeasuredRate(9e6, 6e9)]),
    between_nodes=Link(2e9, 5e-6, [MeasuredRate(12e6, 1e9)]),
)


@pytest.mark.parametrize(
    ("sent", "seconds"),
    [
        (0.0, 1e-6),  # the latency
        (0.5e6, (1e-6 + 0.5e-3) / 2),  # halfway to 1 MB, which takes 0.5 ms
        (1e6, 0.5e-3),
        (2e6, 0.5e-3 + 0.5e-3 / 3),  # a third of the way to 4 MB, which take 1 ms
        (4e6, 1e-3),
        (9e6, 1.5e-3),
        (18e6, 3e-3),  # as fast as the largest that was measured
    ],
)
def test_an_all_to_all_lies_between_the_sizes_that_were_measured(sent: float, seconds: float) -> None:
    """Each of four GPUs of a node keeps a quarter of its buffer."""
    assert collective_seconds("all_to_all", sent * 4 / 3, range(4), SIZED) == pytest.approx(seconds)


def test_between_nodes_the_size_is_what_all_gpus_of_a_node_send() -> None:
    """Four pairs on two nodes of four: each rank sends half of 6 MB, so a node 12 MB, which take 12 ms."""
    assert collective_seconds("all_to_all", 6e6, range(0, 8, 4), SIZED) == pytest.approx(12e-3)
    assert collective_seconds("all_to_all", 12e6, range(0, 8, 4), SIZED) == pytest.approx(24e-3)


@pytest.mark.parametrize(("op", "sent_per_byte"), [("all_reduce", 1.5), ("all_gather", 0.75), ("reduce_scatter", 0.75)])
def test_rings_of_a_measured_group_lie_between_its_sizes(op: Operation, sent_per_byte: float) -> None:
    """By the bytes that a rank of four sends; groups of other sizes keep to the formulas."""
    rates = [MeasuredRate(1e6, 2e9), MeasuredRate(4e6, 4e9)]  # 0.5 ms and 1 ms
    cluster = replace(FOURS, collectives=[MeasuredCollective(op, 4, 1, 1e-4, rates=rates)])
    for sent, seconds in ((0.0, 1e-4), (0.5e6, 3e-4), (2e6, 2e-3 / 3), (4e6, 1e-3), (8e6, 2e-3)):
        assert collective_seconds(op, sent / sent_per_byte, range(4), cluster) == pytest.approx(seconds)
    assert collective_seconds(op, P, range(2), cluster) == collective_seconds(op, P, range(2), FOURS)


def test_rates_of_all_to_alls_change_no_ring() -> None:
    for op in ("all_reduce", "all_gather", "reduce_scatter"):
        for members in (range(4), range(0, 8, 4), range(8)):
            assert collective_seconds(op, P, members, SIZED) == collective_seconds(op, P, members, FOURS)


# ---- what holds for any --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("name", [name for name in cluster_names() if load_cluster(name).between_nodes is not None])
def test_cost_grows_with_bytes_and_is_higher_between_nodes(op: Operation, name: str) -> None:
    cluster = load_cluster(name)
    gpus = cluster.gpus_per_node
    near, far = range(2), range(0, 2 * gpus, gpus)
    for members in (near, far, range(2 * gpus)):
        costs = [collective_seconds(op, payload, members, cluster) for payload in (0, 1, 1e3, 1e6, 1e9)]
        assert costs[0] > 0
        assert costs == sorted(set(costs))
    assert collective_seconds(op, 1e6, near, cluster) < collective_seconds(op, 1e6, far, cluster)


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_group_of_one_costs_nothing(op: Operation) -> None:
    assert collective_seconds(op, P, [3], PAIRS) == 0
    assert collective_seconds(op, P, [0], load_cluster("one_h200")) == 0
    assert wire_bytes_by_link(op, P, [3], 2) == {"in_node": 0, "between_nodes": 0}


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    for members in (range(4), range(0, 8, 2), range(2)):
        parts = [collective_seconds(op, P, members, PAIRS) for op in ("reduce_scatter", "all_gather")]
        assert collective_seconds("all_reduce", P, members, PAIRS) == pytest.approx(sum(parts))


def test_the_largest_worlds_are_priced_at_once() -> None:
    summit = load_cluster("summit")
    assert collective_seconds("all_reduce", P, range(16384), summit) > 0
    assert collective_seconds("all_reduce", P, range(3, 16384, 8), summit) > 0


@pytest.mark.parametrize(
    ("dtd", "cac", "all_reduce", "all_to_all", "all_gather"),
    [
        (False, False, 6.4, 13.2, 0),
        (True, False, 6.4, 3.5, 1.6),
        (False, True, 4.3, 8.8, 0),
        (True, True, 4.3, 2.4, 1.1),
    ],
)
def test_a_step_of_the_papers_largest_run_costs_what_an_independent_prototype_says(
    dtd: bool, cac: bool, all_reduce: float, all_to_all: float, all_gather: float
) -> None:
    """6.7 B × 16 experts on 128 V100, four a node, tensor 4 × expert 16; 1024 × 2048 tokens in 32 micro-batches.

    Seconds a step. The prototype had one constant latency a call (here: steps of a ring) and the same bandwidths.
    """
    summit = replace(load_cluster("summit"), gpus_per_node=4)
    tensor, expert = range(4), range(0, 64, 4)
    activations = 2048 * 4096 * 2  # bytes of a micro-batch in fp16; of the dispatch buffer, too: capacity factor 1
    passes = 2 if cac else 3  # forward, recompute unless CAC, backward; 16 dense and 16 MoE blocks
    calls = 32 * 16 * passes
    reduce = collective_seconds("all_reduce", activations, tensor, summit)
    assert 4 * calls * reduce == pytest.approx(all_reduce, rel=0.03)  # it has the embedding, too
    exchange = collective_seconds("all_to_all", activations / 4 if dtd else activations, expert, summit)
    assert 2 * calls * exchange == pytest.approx(all_to_all, rel=0.1)
    gather = collective_seconds("all_gather", activations, tensor, summit) if dtd else 0
    assert 2 * calls * gather == pytest.approx(all_gather, rel=0.05)


# ---- links ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "gpus_per_node", "link"),
    [([0, 1], 2, "in_node"), ([1, 2], 2, "between_nodes"), ([0, 4], 6, "in_node"), ([4, 8], 6, "between_nodes")],
)
def test_the_link_of_a_group(members: list[int], gpus_per_node: int, link: str) -> None:
    assert link_of(members, gpus_per_node) == link


@pytest.mark.parametrize(
    ("op", "members", "in_node", "between_nodes"),
    [
        ("all_reduce", range(2), 1.0, 0.0),
        ("all_to_all", range(2), 0.5, 0.0),
        ("all_reduce", range(4), 0.75, 0.75),  # of four hops two leave a node
        ("all_gather", range(8), 7 / 16, 7 / 16),
        ("reduce_scatter", range(0, 8, 2), 0.0, 0.75),
        ("all_to_all", range(4), 0.25, 0.5),
        ("all_to_all", range(0, 8, 2), 0.0, 0.75),
    ],
)
def test_wire_bytes_by_link(op: Operation, members: range, in_node: float, between_nodes: float) -> None:
    split = wire_bytes_by_link(op, P, members, 2)
    assert split == pytest.approx({"in_node": in_node * P, "between_nodes": between_nodes * P})


def test_links_divide_unevenly_where_nodes_do() -> None:
    """Ranks 2 3 | 4 5 6 7 … 2–5 on nodes of four would be even; 3–6 has one member on the first node, three after."""
    split = wire_bytes_by_link("all_to_all", 16.0, range(3, 7), 4)
    assert split == pytest.approx({"in_node": (0 + 3 * 2) * 4 / 4, "between_nodes": (3 + 3 * 1) * 4 / 4})


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [[0, 1, 3], [2, 0], [1, 1]])
def test_ranks_out_of_step_are_refused(members: list[int]) -> None:
    with pytest.raises(ValueError, match="in order and evenly spaced"):
        collective_seconds("all_reduce", P, members, PAIRS)


def test_more_ranks_than_a_single_node_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no rank 9 on this cluster: it is one node of 8"):
        collective_seconds("all_reduce", P, [1, 9], load_cluster("this_machine"))
