"""The emulated network: how long collectives take on it, and its totals."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from tedlab import ParallelDegrees, Topology
from tedlab.comm import Collective, Phase, issue_all_to_all
from tedlab.comm.collectives import Operation
from tedlab.predict.cluster import ClusterConfig, Link, load_cluster
from tedlab.predict.cost import collective_seconds, wire_bytes_by_link
from tedlab.predict.emulate import Emulation
from tests.pool import WorkerPool

GROUPS: dict[Any, Any] = {"tensor": [0, 1], "expert": [0, 2], "world": [0, 1, 2, 3]}


class Clock:
    """Time that passes only where someone sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tedlab.predict.emulate.time", clock)
    return clock


def network(in_node: float, between_nodes: float) -> ClusterConfig:
    """Nodes of two, where a step takes so many seconds inside and between them, and bytes cost nothing."""
    summit = replace(load_cluster("summit"), gpus_per_node=2)
    return replace(summit, in_node=Link(1e30, in_node), between_nodes=Link(1e30, between_nodes))


def call(kind: Any, op: Operation = "all_gather", size: int = 1, phase: Phase = "forward") -> Collective:
    return Collective(op, kind, len(GROUPS[kind]), phase, "test", torch.Size([size]), torch.uint8)


def run(emulation: Emulation, one: Collective) -> None:
    emulation(one, "start")
    emulation(one, "end")


def test_a_delay_is_real() -> None:
    """On the true clock. Never too short; how much too long is up to the machine."""
    emulation = Emulation(network(0.002, 0.02), GROUPS, dilation=2)
    begin = time.perf_counter()
    run(emulation, call("expert"))
    assert 0.04 <= time.perf_counter() - begin < 0.2


@pytest.mark.parametrize(("kind", "seconds"), [("tensor", 2), ("expert", 5), ("world", 2 * 2 + 5)])
@pytest.mark.parametrize("dilation", [0, 1, 3])
def test_a_collective_takes_as_long_as_its_links_need(clock: Clock, kind: Any, seconds: float, dilation: float) -> None:
    emulation = Emulation(network(2, 5), GROUPS, dilation)
    run(emulation, call(kind))
    assert clock.now - 1000 == pytest.approx(dilation * seconds)
    assert sum(emulation.seconds.values()) == pytest.approx(seconds)


@pytest.mark.parametrize(("work", "total"), [(3.0, 5.0), (8.0, 8.0)])
def test_work_between_start_and_end_hides_the_network(clock: Clock, work: float, total: float) -> None:
    emulation, one = Emulation(network(2, 5), GROUPS), call("expert")
    emulation(one, "start")
    clock.sleep(work)
    emulation(one, "end")
    assert clock.now - 1000 == pytest.approx(total)


def test_collectives_under_way_together_queue_for_their_link_and_not_for_another(clock: Clock) -> None:
    emulation = Emulation(network(2, 5), GROUPS)
    under_way = [call("expert"), call("expert"), call("tensor")]
    ends = []
    for one in under_way:
        emulation(one, "start")
    for one in reversed(under_way):
        emulation(one, "end")
        ends.append(clock.now - 1000)
    assert ends == pytest.approx([2, 5, 10])


def test_a_network_that_was_idle_owes_nothing(clock: Clock) -> None:
    emulation = Emulation(network(2, 5), GROUPS)
    run(emulation, call("expert"))
    clock.sleep(100)
    run(emulation, call("expert"))
    assert clock.now - 1000 == pytest.approx(110)


def test_totals_are_exact() -> None:
    cluster = replace(load_cluster("summit"), gpus_per_node=2)
    emulation = Emulation(cluster, GROUPS, dilation=0)
    calls = [
        call("tensor", "all_reduce", 1000),
        call("tensor", "all_reduce", 1000),
        call("expert", "all_to_all", 512),
        call("world", "reduce_scatter", 4096, "optimizer"),
    ]
    for one in calls:
        run(emulation, one)
    emulation.counting = False
    run(emulation, calls[0])  # of a validation pass, say
    cost = [collective_seconds(c.op, c.payload_bytes, GROUPS[c.kind], cluster) for c in calls]
    split = wire_bytes_by_link("reduce_scatter", 4096, GROUPS["world"], 2)
    assert emulation.metrics() == {
        "comm/link/in_node/emulated_seconds": cost[0] + cost[1],
        "comm/link/between_nodes/emulated_seconds": cost[2] + cost[3],
        "comm/link/in_node/wire_bytes": 2000 + split["in_node"],
        "comm/link/between_nodes/wire_bytes": 256 + split["between_nodes"],
    }
    assert sum(emulation.wire_bytes.values()) == sum(c.wire_bytes for c in calls)


def test_fewer_ranks_on_a_node_have_its_network_for_themselves() -> None:
    summit = load_cluster("summit")
    seconds = {}
    for ranks in (1, 2):
        emulation = Emulation(summit, GROUPS, dilation=0, ranks_per_node=ranks)
        emulation(call("expert", "all_to_all", 10**9), "start")
        seconds[ranks] = emulation.seconds["forward", "between_nodes"]
    assert seconds[2] == pytest.approx(2 * seconds[1], rel=1e-3)
    alone = Emulation(summit, GROUPS, dilation=0, ranks_per_node=1)
    alone(call("tensor"), "start")
    assert list(alone.seconds) == [("forward", "between_nodes")]


@pytest.mark.parametrize(
    ("cluster", "options", "complaint"),
    [
        ("summit", {"dilation": -1.0}, "dilation is -1; it must be at least 0"),
        ("summit", {"ranks_per_node": 7}, "ranks_per_node is 7; .* room for 1 to 6"),
        ("summit", {"ranks_per_node": 0}, "ranks_per_node is 0; .* room for 1 to 6"),
        ("one_h200", {}, "no rank 1 on this cluster: it is one node of 1"),
    ],
)
def test_an_emulation_that_cannot_be_is_refused_at_once(cluster: str, options: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Emulation(load_cluster(cluster), GROUPS, **options)


class Work(Function):
    """Takes so many seconds in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grads[0] * 2, None


LINK, WORK = 0.06, 0.04  # seconds


def both_passes() -> list[float]:
    """The seconds of both passes of an exchange and of work: one after the other, and beside each other."""
    comm, taken = Topology(ParallelDegrees(2, 1, 2)).comm, []
    comm.register_hook(Emulation(network(LINK, LINK), comm.ranks))
    for beside in (False, True):
        x = torch.ones(4, 3, requires_grad=True)
        dist.barrier()
        begin = time.perf_counter()
        issued = issue_all_to_all(x, comm, "expert", "test")
        early = Work.apply(x, WORK) if beside else None
        arrived = issued.wait()
        work = Work.apply(x, WORK) if early is None else early
        (arrived + work).sum().backward()
        taken.append(time.perf_counter() - begin)
    return taken


def test_an_emulated_exchange_goes_on_while_a_process_works(pool: WorkerPool) -> None:
    """On gloo, in both passes; generous, for machines that are busy."""
    for blocking, beside in pool.run(2, both_passes):
        assert blocking >= 2 * (LINK + WORK)
        assert 2 * LINK <= beside < blocking - WORK
