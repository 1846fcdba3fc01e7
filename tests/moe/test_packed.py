"""Packed experts compute what slots compute, of the same choices, and send nothing that is empty."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tedlab import ParallelDegrees, Topology
from tedlab.config import CommOptions, MoEConfig, RouterConfig
from tedlab.moe import MoELayer, MoESpec, RouterReport, Routing
from tedlab.moe.packed import without_gaps
from tedlab.nn import FeedForwardSpec, Init, initialize
from tests.pool import WorkerPool

HIDDEN, EXPERTS = 6, 4
CAPACITY = MoEConfig(num_experts=EXPERTS, top_k=2, dispatch="capacity", capacity_factor=0.6, capacity_multiple=1)
MIXTURES = {
    "by_position": CAPACITY,
    "by_score": replace(CAPACITY, drop_policy="probs"),
    "nothing_dropped": replace(CAPACITY, capacity_factor=None),
    "most_dropped": replace(CAPACITY, capacity_factor=0.05, top_k=3),
    "in_groups_padded": replace(CAPACITY, capacity_groups=2, capacity_multiple=4, top_k=1),
    "deepspeed": replace(CAPACITY, gating="deepspeed_topk", min_capacity=1),
    "expert_choice": replace(CAPACITY, gating="expert_choice", router=RouterConfig(scoring="sigmoid")),
}
MODES = {
    "plain": (CommOptions(), False),
    "dtd": (CommOptions(dtd=True), False),
    "fused": (CommOptions(dtd=True, fuse_reduce_scatter=True), False),
    "sequence": (CommOptions(), True),
}


def passed(config: MoEConfig, topology: Topology, x: Tensor, padding: Tensor | None) -> tuple[MoELayer, list[Tensor]]:
    """The layer's result, number of dropped choices, and all gradients."""
    torch.set_default_dtype(torch.float64)
    expert = FeedForwardSpec(HIDDEN, 8, Init(std=1.0), Init(std=0.5), "gelu")
    layer = MoELayer(MoESpec(expert, config), topology)
    torch.set_default_dtype(torch.float32)
    initialize(layer, seed=3)
    for name in ("up_bias", "down_bias"):
        values = layer.experts.get_parameter(name)._local_tensor  # type: ignore[attr-defined]
        values.data.copy_(torch.linspace(-1, 1, values.numel()).view_as(values))
    leaf = x.clone().requires_grad_()
    y, report = layer(leaf, padding)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = [p.grad.to_local() for p in layer.parameters()]  # type: ignore[union-attr]
    assert leaf.grad is not None
    return layer, [y.detach(), report.dropped, leaf.grad, *gradients]


def packed_and_slots(tensor: int, mode: str) -> tuple[list[str], list[tuple[int, int, int]]]:
    """What differs; and how many rows were sent, how many slots would have been, and how many choices were dropped."""
    options, sequence = MODES[mode]
    degrees = ParallelDegrees(dist.get_world_size(), tensor, dist.get_world_size() // tensor, sequence)
    topology, wrong, numbers = Topology(degrees, options=options), [], []
    rank = dist.get_rank() if sequence else topology.comm.rank("data")
    for name, config in MIXTURES.items():
        if sequence and config.gating == "deepspeed_topk":
            continue
        draw = torch.Generator().manual_seed(rank)
        x = torch.randn(2, 10, HIDDEN, generator=draw, dtype=torch.float64)
        masks = [None] if config.gating == "deepspeed_topk" else [None, torch.arange(20).view(2, 10) % 5 == 3]
        if sequence and config.capacity_groups:
            config = replace(config, capacity_groups=2 * tensor, capacity_multiple=4 * tensor)
        for padding in masks:
            (layer, packed), (slots, expected) = (
                passed(replace(config, dispatch=dispatch), topology, x, padding) for dispatch in ("packed", "capacity")
            )
            for number, (a, b) in enumerate(zip(packed, expected, strict=True)):
                if (a - b).abs().max() > 1e-13 * b.abs().max().clamp(min=1):
                    wrong.append(f"{name}, padding {padding is not None}: {number} off by {(a - b).abs().max()}")
            assert layer.experts.moved is not None
            capacity = slots.router.capacity(20)
            numbers.append((layer.experts.moved.sent, EXPERTS * capacity, int(packed[1])))
    return wrong, numbers


@pytest.mark.parametrize(
    ("world_size", "tensor", "mode"),
    [(1, 1, "plain"), *((4, 2, mode) for mode in MODES), (4, 4, "fused"), (4, 1, "plain")],
)
def test_packed_experts_compute_what_slots_compute(pool: WorkerPool, world_size: int, tensor: int, mode: str) -> None:
    """Result, drops and every gradient in float64, to 1e-13: products are of other sizes."""
    for wrong, numbers in pool.run(world_size, packed_and_slots, tensor, mode):
        assert not wrong, "\n".join(wrong)
        sent, slots, dropped = map(sum, zip(*numbers, strict=True))
        assert sent < slots / (tensor if mode in ("dtd", "fused") else 1)
        assert dropped > 0


@pytest.fixture
def single() -> Iterator[Topology]:
    yield Topology.single()
    dist.destroy_process_group()


def test_only_full_slots_are_sent(single: Topology) -> None:
    x = torch.randn(2, 10, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer, (_, dropped, *_) = passed(replace(CAPACITY, dispatch="packed"), single, x, None)
    assert layer.experts.moved is not None
    assert layer.experts.moved.sent == layer.experts.moved.computed == 2 * 20 - int(dropped)


def test_full_slots_move_to_the_front_in_their_order() -> None:
    zero, slot_TK = torch.zeros(()), torch.tensor([[0, 4], [-1, 5], [3, -1]])
    choice_EC = torch.tensor([0, -1, -1, 4, 1, 3])  # of two experts with three slots
    routing = Routing(torch.ones(3, 2), slot_TK, choice_EC, RouterReport(zero, zero, torch.tensor([2, 4]), zero))
    packed = without_gaps(routing, 2)
    assert packed.choice_EC.tolist() == [0, 4, 1, 3, -1, -1]
    assert packed.slot_TK.tolist() == [[0, 2], [-1, 3], [1, -1]]
    assert packed.counts_E.tolist() == [1, 3]
