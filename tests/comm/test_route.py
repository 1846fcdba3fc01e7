"""Rows that go by way of nodes: the same arrive in the same order, in fewer messages between nodes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tedlab import ParallelDegrees
from tedlab.comm import Collectives, Ledger
from tedlab.comm.ledger import differences
from tedlab.comm.rows import relayed
from tedlab.config import CommOptions
from tedlab.predict.cluster import load_cluster
from tedlab.predict.emulate import Emulation
from tedlab.predict.volumes import predict, with_rows
from tedlab.spec import Layout
from tests.comm.test_ledger import LEND, MODES, Overrides, configuration, one_step, topology_of
from tests.pool import WorkerPool

BLOCK: Overrides = {"moe.num_experts": 16, "moe.top_k": 3, "moe.every": 1, "model.layers": 1}
CAC: Overrides = {"comm.cac": True, "model.recompute.early_stop": False}
CELLS: dict[str, tuple[tuple[int, int, int], int, Overrides]] = {  # layout, ranks of a node
    "slots, 2 × 4": ((8, 1, 8), 4, {"comm.chunks": 2}),
    "rows, 4 × 2": ((8, 1, 8), 2, {"moe.dispatch": "dropless", **CAC}),
    "packed rows, 2 × 4": ((8, 1, 8), 4, {"moe.dispatch": "packed"}),
    "lent experts, 2 × 4": ((8, 1, 8), 4, {**LEND, "moe.lend.threshold": 1.1}),
    "slots, dtd": ((8, 2, 4), 4, {**MODES["dtd"], "comm.cac": "shard"}),
    "slots, sequence": ((8, 2, 4), 4, {**MODES["sequence"], "comm.cac": ["combine.in_node", "dispatch.in_node"]}),
    "rows, plain": ((8, 2, 4), 4, {**MODES["dropless_plain"], "comm.cac": ["combine.between_nodes"]}),
    "rows, fused": ((8, 2, 4), 4, {**MODES["dropless_fused"], **CAC}),
    "rows in chunks, fused": ((8, 2, 4), 4, {**MODES["dropless_fused"], "comm.chunks": 2}),
    "rows, sequence": ((8, 2, 4), 4, {**MODES["dropless_sequence"], "trainer.precision": "bf16-mixed"}),
}
PILOTS: dict[str, tuple[tuple[int, int, int], int, Overrides]] = {
    "2 × 4": ((8, 1, 8), 4, CAC),
    "4 × 2": ((8, 1, 8), 2, {"comm.cac": ["combine.between_nodes", "dispatch.in_node", "dispatch.gates_in_node"]}),
    "plain": ((8, 2, 4), 4, {"comm.cac": ["dispatch.between_nodes", "combine.in_node"]}),
    "fused": ((8, 2, 4), 4, {**MODES["fused"], "comm.cac": "shard"}),
    "sequence": ((8, 2, 4), 4, {**MODES["sequence"], **CAC}),
}
OFTEN = ("slots, 2 × 4", "rows, 4 × 2", "lent experts, 2 × 4", "slots, sequence", "rows in chunks, fused")
OFTEN_PILOTS = ("2 × 4", "4 × 2", "sequence")
ROUNDING = 1e-12  # relative: sums are added in another order
Traffic = Counter[str]


class BetweenNodes:
    """Messages and bytes that this process sends to other nodes in exchanges, counted from their splits."""

    def __init__(self, comm: Collectives, per_node: int, patch: pytest.MonkeyPatch) -> None:
        self.seen: Traffic = Counter()
        ranks, own, right = comm.ranks, comm.rank("world") // per_node, comm.start_all_to_all

        def start(x: Any, kind: Any, *, tag: str, phase: Any, splits: Any = None) -> Any:
            group = ranks[kind]
            sent = splits.sent if splits is not None else [len(x) // len(group)] * len(group)
            away = [rows for rank, rows in zip(group, sent, strict=True) if rank // per_node != own]
            if "counts" not in tag:
                self.seen["messages"] += len(away)
                self.seen["bytes"] += sum(away) * x[:1].nbytes
            return right(x, kind, tag=tag, phase=phase, splits=splits)

        patch.setattr(comm, "start_all_to_all", start)


def step(layout: tuple[int, int, int], per_node: int, overrides: Overrides) -> tuple[Any, Traffic, list[str]]:
    """Results of an optimizer step, what it sent to other nodes, and where ledger and closed form differ."""
    config = configuration(layout, {**BLOCK, **overrides})
    topology, ledger = topology_of(config), Ledger()
    emulation = Emulation(load_cluster("frontier"), topology.comm.ranks, 0, per_node)
    handle = topology.comm.register_hook(emulation)
    with pytest.MonkeyPatch.context() as patch:
        meter = BetweenNodes(topology.comm, per_node, patch)
        results, _, moved = one_step(config, topology, ledger)
    handle.remove()
    exchanged = [emulation.wire_bytes[phase, "between_nodes"] for phase in ("forward", "recompute", "backward")]
    meter.seen["emulated bytes"] = round(sum(exchanged))
    wrong = differences(ledger.totals, with_rows(predict(config), config, moved))
    return results, meter.seen, [f"{entry}: {ours} instead of {theirs}" for entry, (ours, theirs) in wrong.items()]


def both_ways(names: Sequence[str]) -> tuple[list[str], dict[str, list[Traffic]]]:
    """What is wrong, and what each cell sent to other nodes, directly and by way of them."""
    complaints, traffic = [], {}
    for name in names:
        layout, per_node, overrides = CELLS[name]
        kept = overrides.get("comm.cac")
        as_kept: Overrides = {} if not isinstance(kept, list) else {"comm.cac": False}
        direct, before, _ = step(layout, per_node, {**overrides, **as_kept})
        by_node = {**overrides, "comm.hierarchical": True, "comm.ranks_per_node": per_node}
        results, after, wrong = step(layout, per_node, by_node)
        complaints += [f"{name}: {line}" for line in wrong]
        if not all(torch.equal(a, b) for a, b in zip(results, direct, strict=True)):
            complaints.append(f"{name}: other results")
        if not kept:
            traffic[name] = [before, after]
    return complaints, traffic


def of_pilots(names: Sequence[str]) -> tuple[list[str], dict[str, Traffic], float]:
    """What is wrong, what each way of sending tokens sent to other nodes in a layout, and the largest error."""
    complaints, traffic, largest = [], {}, 0.0
    for name in names:
        layout, per_node, overrides = PILOTS[name]
        base: Overrides = {"moe.dispatch": "dropless", "trainer.precision": "64-true", "comm.ranks_per_node": per_node}
        base |= {key: value for key, value in overrides.items() if not key.startswith(("comm.cac", "model."))}
        ways: dict[str, Overrides] = {
            "none": base,
            "node": {**base, "comm.dedup": "node"},
            "node, kept": {**base, **overrides, "comm.dedup": "node"},
        }
        if name == "2 × 4":
            ways |= {
                "hierarchical": {**base, "comm.hierarchical": True},
                "rank": {**base, "comm.dedup": "rank"},
                "node, stored": {**base, "comm.dedup": "node", "model.recompute.granularity": "none"},
            }
        found = {way: step(layout, per_node, its) for way, its in ways.items()}
        complaints += [f"{name}, {way}: {line}" for way, (_, _, wrong) in found.items() for line in wrong]
        for way in found.keys() & {"node, kept", "node, stored"}:
            if not all(torch.equal(a, b) for a, b in zip(found[way][0], found["node"][0], strict=True)):
                complaints.append(f"{name}, {way}: other results")
        for ours, theirs in zip(found["node"][0], found["none"][0], strict=True):
            largest = max(largest, ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item())
        if name == "2 × 4":
            traffic = {way: seen for way, (_, seen, _) in found.items()}
    return complaints, traffic, largest


SAMPLE_OR_ALL = [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.exhaustive)]


@pytest.fixture(scope="module", params=SAMPLE_OR_ALL, ids=["sample", "all"])
def pilots(pool: WorkerPool, request: pytest.FixtureRequest) -> list[tuple[list[str], dict[str, Traffic], float]]:
    return pool.run(8, of_pilots, [*PILOTS] if request.param else OFTEN_PILOTS, timeout=200)


def test_pilots_by_way_of_nodes_bring_the_same_results_and_recomputation_repeats_them(pilots: Any) -> None:
    """To the last bit whatever is kept, and to rounding those of rows; bytes are those of the closed form."""
    for complaints, _, largest in pilots:
        assert not complaints, "\n".join(complaints)
        assert largest < ROUNDING


def test_a_token_goes_once_to_each_node(pilots: Any) -> None:
    """Of all processes together. Numbers and weights of choices count, too."""
    sent = {way: sum((traffic[way] for _, traffic, _ in pilots), Counter()) for way in pilots[0][1]}
    assert sent["node"]["bytes"] < sent["rank"]["bytes"] < sent["none"]["bytes"]
    assert sent["hierarchical"]["bytes"] == sent["none"]["bytes"]
    # An emulated network counts so, too, though it takes the mean over processes, and the numbers that they exchange.
    assert sent["node"]["emulated bytes"] < sent["rank"]["emulated bytes"] < sent["none"]["emulated bytes"]


@pytest.fixture(scope="module", params=SAMPLE_OR_ALL, ids=["sample", "all"])
def cells(pool: WorkerPool, request: pytest.FixtureRequest) -> list[tuple[list[str], dict[str, list[Traffic]]]]:
    return pool.run(8, both_ways, [*CELLS] if request.param else OFTEN, timeout=200)


def test_by_way_of_nodes_results_are_the_same_to_the_last_bit_and_bytes_those_of_the_closed_form(cells: Any) -> None:
    for complaints, _ in cells:
        assert not complaints, "\n".join(complaints)


def test_fewer_messages_bring_as_many_bytes_to_other_nodes(cells: Any) -> None:
    """Of all processes together: which of a node's processes sends what is another matter."""
    for name in cells[0][1]:
        before, after = (sum((traffic[name][way] for _, traffic in cells), Counter()) for way in (0, 1))
        places = CELLS[name][1] // CELLS[name][0][1]
        if not name.startswith("lent"):
            assert after["bytes"] == before["bytes"] > 0, name
            assert before["messages"] == places * after["messages"], name


def test_a_process_relays_what_those_with_its_place_send_to_its_node() -> None:
    sent = np.arange(16).reshape(4, 4)  # of two nodes with two processes each: process 1 is (0, 1)
    assert relayed(sent, 1, 2).tolist() == [4, 5, 12, 13]
    assert relayed(sent, 2, 2).tolist() == [2, 3, 10, 11]


@pytest.mark.parametrize(
    ("degrees", "per_node", "in_node", "between_nodes"),
    [
        (ParallelDegrees(8, 1, 8), 4, range(4, 8), range(1, 8, 4)),
        (ParallelDegrees(8, 2, 4), 4, range(5, 9, 2), range(1, 8, 4)),
        (ParallelDegrees(16, 1, 8), 2, range(4, 6), range(1, 8, 2)),
    ],
)
def test_an_expert_group_is_divided_inside_nodes_and_between_them(
    degrees: ParallelDegrees, per_node: int, in_node: range, between_nodes: range
) -> None:
    """Of rank 5."""
    groups = Layout(degrees, CommOptions(hierarchical=True, ranks_per_node=per_node)).groups(5)
    assert list(groups["expert_in_node"]) == list(in_node)
    assert list(groups["expert_between_nodes"]) == list(between_nodes)


def test_groups_whose_nodes_have_unequal_parts_of_them_are_refused() -> None:
    with pytest.raises(ValueError, match="with 4 ranks per node the group of ranks 0, 1, 2, 3, 4, 5 has 4 and 2, and"):
        ParallelDegrees(12, 1, 6).nodes(4)
    assert ParallelDegrees(12, 1, 6).nodes(3) == 2
    assert ParallelDegrees(8, 2, 2).nodes(8) == 1
