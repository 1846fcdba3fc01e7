"""Tokens to experts and back. The experts here are formulas, so that every result has a closed form."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tedlab import ParallelDegrees, Topology
from tedlab.config import CommOptions
from tedlab.moe import AllToAllPath, RouterReport, Routing, assign_slots, token_path
from tests.pool import WorkerPool

EXPERTS, HIDDEN = 4, 3


def routing_of(expert_TK: Tensor, gate_TK: Tensor, capacity: int) -> Routing:
    slot_TK, choice_EC, load_E = assign_slots(expert_TK, EXPERTS, capacity)
    zero = torch.zeros(())
    return Routing(gate_TK, slot_TK, choice_EC, RouterReport(zero, zero, load_E, (slot_TK < 0).sum()))


def problem(rank: int, top_k: int, tokens: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, gates and distinct choices of one data rank."""
    generator = torch.Generator().manual_seed(10 * rank + top_k)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    gates = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    experts = torch.rand(tokens, EXPERTS, generator=generator).argsort(-1)[:, :top_k]
    return x, gates, experts


def expected(x: Tensor, gate_TK: Tensor, routing: Routing, expert_TK: Tensor) -> Tensor:
    """Σ_k gate · expert(x) over the choices that found a slot, expert e being x ↦ tanh((e + 1)·x)."""
    kept = (routing.slot_TK >= 0).double() * gate_TK
    return (kept.unsqueeze(-1) * torch.tanh((expert_TK + 1).unsqueeze(-1) * x.unsqueeze(1))).sum(1)


def through_experts(x: Tensor, routing: Routing, topology: Topology) -> Tensor:
    """Dispatch, the formulas of this process's experts, of which each tensor rank computes a share, combine."""
    path, region = token_path(EXPERTS, topology)
    slots = region.enter(path.dispatch(x, routing))
    first = topology.comm.rank("expert") * len(slots)
    factor = torch.arange(first, first + len(slots), dtype=torch.float64).view(-1, 1, 1) + 1
    partial = torch.tanh(factor * slots) / topology.degrees.tensor
    return path.combine(region.leave(partial, torch.zeros(len(slots), 1, HIDDEN, dtype=torch.float64)), routing)


MODES = {
    "plain": CommOptions(),
    "dtd": CommOptions(dtd=True),
    "fused": CommOptions(dtd=True, fuse_reduce_scatter=True),
}


def exchange(top_k: int, capacity: int, tensor: int = 1, mode: str = "plain") -> list[tuple[Tensor, Tensor]]:
    """Pairs of ours and the closed form: result, gradient of tokens, gradient of gates."""
    degrees = ParallelDegrees(dist.get_world_size(), tensor, dist.get_world_size() // tensor)
    topology = Topology(degrees, options=MODES[mode])
    x, gates, experts = (t.clone() for t in problem(topology.comm.rank("data"), top_k))
    pairs = []
    for run in (through_experts, expected):
        leaves = x.clone().requires_grad_(), gates.clone().requires_grad_()
        routing = routing_of(experts, leaves[1], capacity)
        y = run(leaves[0], routing, topology) if run is through_experts else run(*leaves, routing, experts)
        gradients = torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), leaves)
        pairs.append((y.detach(), *gradients))
    return list(zip(*pairs, strict=True))


@pytest.mark.parametrize(
    ("world_size", "tensor", "mode"),
    [
        (1, 1, "plain"),
        (2, 1, "dtd"),
        (4, 1, "plain"),
        *((4, 2, mode) for mode in MODES),
        (4, 4, "dtd"),
        (4, 4, "fused"),
    ],
)
@pytest.mark.parametrize(("top_k", "capacity"), [(1, 10), (2, 3), (3, 1)])  # T divides the first alone
def test_each_token_comes_back_from_its_experts_in_every_world(
    pool: WorkerPool, world_size: int, tensor: int, mode: str, top_k: int, capacity: int
) -> None:
    for pairs in pool.run(world_size, exchange, top_k, capacity, tensor, mode):
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("top_k", [1, 2])
def test_identity_experts_return_the_gated_token_and_zeros_where_it_was_dropped(single: Topology, top_k: int) -> None:
    x, gates, experts = problem(0, top_k)
    routing = routing_of(experts, gates, capacity=2)
    path = AllToAllPath(EXPERTS, single)
    slots = path.dispatch(x, routing)
    assert slots.shape == (EXPERTS, 2, HIDDEN)
    kept = (routing.slot_TK >= 0).double() * gates
    assert (kept.sum(1) == 0).any()  # some tokens lose every choice,
    assert (kept.sum(1) > 0).any()  # some do not
    torch.testing.assert_close(path.combine(slots, routing), kept.sum(1, keepdim=True) * x)
    assert (path.combine(slots, routing)[kept.sum(1) == 0] == 0).all()


def test_empty_slots_are_zero_also_next_to_tokens_that_are_not_finite(single: Topology) -> None:
    x = torch.full((3, HIDDEN), torch.inf)
    routing = routing_of(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), capacity=4)
    slots = AllToAllPath(EXPERTS, single).dispatch(x, routing)
    assert torch.equal(slots[0, :3], x)
    assert (slots[0, 3] == 0).all()
    assert (slots[1:] == 0).all()


@pytest.mark.parametrize(("top_k", "capacity"), [(1, 8), (1, 1), (2, 2), (3, 2)])
def test_gradients_are_those_of_finite_differences(single: Topology, top_k: int, capacity: int) -> None:
    x, gates, experts = problem(0, top_k, tokens=6)

    def path(x: Tensor, gates: Tensor) -> Tensor:
        return through_experts(x, routing_of(experts, gates, capacity), single)

    assert torch.autograd.gradcheck(path, (x.requires_grad_(), gates.requires_grad_()))
