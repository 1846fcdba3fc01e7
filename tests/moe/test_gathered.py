"""Tokens that come to every process of their expert group are what rows that are exchanged are, in every world."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tedlab import ParallelDegrees, Topology
from tedlab.comm import Collective
from tedlab.config import CommOptions, MoEConfig
from tedlab.moe import ExpertsSpec, MoELayer, MoESpec, mixtures, products
from tedlab.moe.gathered import GatheredExperts
from tedlab.moe.grouped import Groups, native, times
from tedlab.nn import FeedForwardSpec, Init, initialize
from tests.moe.test_ragged import CHOICES, EXPERTS, MODES, layer_of, problem, routing_of
from tests.pool import WorkerPool

CELLS = [(4, 1, "plain"), (4, 2, "plain"), (4, 2, "fused"), (4, 2, "sequence")]


def gathered_and_rows(tensor: int, mode: str) -> list[str]:
    """Differences between a layer that gathers tokens and one that exchanges rows."""
    options, sequence = MODES[mode]
    world = dist.get_world_size()
    topology = Topology(ParallelDegrees(world, tensor, world // tensor, sequence), options=options)
    rank, wrong = dist.get_rank() if sequence else topology.comm.rank("data"), []
    for choices, (top_k, activation) in itertools.product(CHOICES, ((1, "gelu"), (2, "gelu"), (3, "swiglu"))):
        x, gates, experts = problem(rank, top_k, choices)
        found: list[tuple[Any, ...]] = []
        for dedup in ("group", "none"):
            layer = layer_of(dedup, topology, activation)
            leaves = x.clone().requires_grad_(), gates.clone().requires_grad_()
            y = layer(leaves[0], routing_of(experts, leaves[1]))
            (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
            weights = (p.grad.to_local() for p in layer.parameters())  # type: ignore[union-attr]
            found.append((y.detach(), leaves[0].grad, leaves[1].grad, *weights))
        for place, (a, b) in enumerate(zip(*found, strict=True)):
            if (a - b).abs().max() > 1e-12 * b.abs().max().clamp(min=1):
                wrong.append(f"{choices}, top {top_k}: {place} off by {(a - b).abs().max()}")
    return wrong


@pytest.mark.parametrize("cell", CELLS)
def test_gathered_tokens_are_what_exchanged_rows_are(pool: WorkerPool, cell: tuple[int, int, str]) -> None:
    for wrong in pool.run(cell[0], gathered_and_rows, *cell[1:]):
        assert not wrong, "\n".join(wrong)


def poisoned(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Products that leave in the room behind the last row what memory held before."""
    result = times(x, weight, groups)
    result[int(groups.ends[-1]) :] = float("nan")
    return result


def without_reads() -> list[str]:
    """What is wrong with bf16 experts, which need not know how many rows there are."""
    degrees, wrong = ParallelDegrees(2, 1, 2), []
    topology = Topology(degrees, options=CommOptions(dedup="group"))
    config = MoEConfig(num_experts=EXPERTS, top_k=3, dispatch="dropless", capacity_factor=None)
    spec = ExpertsSpec(FeedForwardSpec(8, 8, Init(std=0.5), Init(std=0.5), "swiglu", bias=False), config)
    draw = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(16, 8, generator=draw)
    for choices in CHOICES:
        _, gates, experts = problem(dist.get_rank(), 3, choices, 16)
        found: list[list[Any]] = []
        for dtype, dedup in ((torch.bfloat16, "group"), (torch.float64, "none")):
            topology.options = replace(topology.options, dedup=dedup)
            layer = mixtures["dropless"].make(spec, topology)
            initialize(layer, seed=3)
            layer = layer.to(dtype)
            leaves = x.to(dtype).requires_grad_(), gates.float().to(torch.promote_types(dtype, torch.float32))
            leaves[1].requires_grad_()
            with pytest.MonkeyPatch.context() as patch:
                if dedup == "group":
                    assert isinstance(layer, GatheredExperts)
                    patch.setattr(products, "times", poisoned)
                    patch.setattr(topology.comm, "reader", lambda values: wrong.append("a read"))
                y = layer(leaves[0], routing_of(experts, leaves[1]))
                (y * torch.linspace(-1, 2, y.numel(), dtype=dtype).view_as(y)).sum().backward()
            weights = [p.grad.to_local() for p in layer.parameters()]  # type: ignore[union-attr]
            found.append([y.detach(), leaves[0].grad, leaves[1].grad, *weights])
        for place, (ours, theirs) in enumerate(zip(*found, strict=True)):
            if not (ours.double() - theirs).abs().max() < 0.03 * theirs.abs().max().clamp(min=0.1):
                wrong.append(f"{choices}: {place} off by {(ours.double() - theirs).abs().max()}")
    return wrong


def test_in_bf16_the_host_reads_nothing_and_nobody_what_is_behind_the_last_row(pool: WorkerPool) -> None:
    assert native(torch.bfloat16, 8, 8)
    for wrong in pool.run(2, without_reads):
        assert not wrong, "\n".join(wrong)


def uneven() -> str:
    topology = Topology(ParallelDegrees(2, 1, 2), options=CommOptions(dedup="group"))
    layer = layer_of("group", topology, "gelu")
    try:
        layer.expect(7 + dist.get_rank(), 0)
    except ValueError as error:
        return str(error)
    return ""


def test_unequal_numbers_of_tokens_are_refused_and_what_takes_them_is_named(pool: WorkerPool) -> None:
    for said in pool.run(2, uneven):
        assert said.startswith("comm.dedup=group gathers equally many tokens from every process of an expert group")
        assert "process 0 7 tokens, process 1 8 tokens" in said
        assert "comm.dedup=rank" in said


def events() -> list[str]:
    """What a layer does with tokens that leave before its router chooses."""
    topology = Topology(ParallelDegrees(2, 1, 2), options=CommOptions(dedup="group"))
    config = MoEConfig(num_experts=EXPERTS, top_k=2, dispatch="dropless", capacity_factor=None)
    layer = MoELayer(MoESpec(FeedForwardSpec(8, 8, Init(), Init(), "swiglu", bias=False), config), topology)
    initialize(layer, seed=3)
    heard: list[str] = []

    def hear(call: Collective, event: str) -> None:
        if call.tag == "dispatch.all_gather":
            heard.append(f"{event} ({call.phase})")

    topology.comm.register_hook(hear)
    layer.router.register_forward_hook(lambda *_: heard.append("router"))
    (weight,) = layer.router.parameters()
    weight.register_hook(lambda gradient: heard.append("router, backward"))
    layer(torch.randn(1, 6, 8).requires_grad_())[0].square().sum().backward()
    return heard


def test_the_router_runs_while_tokens_are_on_their_way_and_backward_while_their_gradients_are(pool: WorkerPool) -> None:
    for heard in pool.run(2, events):
        assert heard[:3] == ["start (forward)", "router", "end (forward)"]
        assert heard[3:] == ["start (backward)", "router, backward", "end (backward)"]
