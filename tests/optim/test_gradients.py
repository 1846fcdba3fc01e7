"""Reduction, norm and clipping on gradients made by hand: data rank d backpropagates d + 1 times known numbers."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tedlab import ParallelDegrees, Topology
from tedlab.nn import Init, ShardedModule, initialize
from tedlab.optim import ShardedOptimizer
from tedlab.spec import ParameterSpec
from tests.moved import Moved
from tests.pool import WorkerPool
from tests.training import full

SHAPES = {"replicated": (5,), "rows": (8, 3), "columns": (3, 8), "experts": (4, 3, 8), "expert_bias": (4, 1, 3)}
SHARDS = {
    "replicated": {},
    "rows": {"tensor": 0},
    "columns": {"tensor": 1},
    "experts": {"expert": 0, "expert_tensor": 2},
    "expert_bias": {"expert": 0},
}
PLAIN = (2, 3)
LAYOUTS = [(1, 1, 1), (2, 2, 1), (4, 1, 2), (8, 2, 2)]


class Example(ShardedModule):
    def __init__(self, topology: Topology) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            mesh = "expert" if name.startswith("expert") else "dense"
            self.add_parameter(ParameterSpec(name, shape, Init(), SHARDS[name], mesh), topology)
        self.plain = nn.Parameter(torch.zeros(PLAIN))
        self.unused = nn.Parameter(torch.zeros(2))
        initialize(self, 0)
        self.double()


def numbers(name: str) -> Tensor:
    """The whole gradient that a process with factor 1 would have, were it alone."""
    shape = SHAPES.get(name, PLAIN)
    return torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64).view(shape).sin()


def example(tensor: int, expert: int) -> tuple[Example, Topology]:
    """A model whose backward pass has run. Tensor ranks of one data rank agree, as they do in training.

    The gradient of data rank d is (d + 1)·numbers, and of its experts it has that share alone: after the all-to-all,
    each process holds for its own experts what all data ranks of its expert group have caused.
    """
    topology = Topology(ParallelDegrees(dist.get_world_size(), tensor, expert))
    module, comm = Example(topology), topology.comm
    loss: Any = (module.plain * numbers("plain")).sum() * (comm.rank("data") + 1)
    first = comm.rank("expert_data") * comm.size("expert")
    shared = sum(range(first + 1, first + comm.size("expert") + 1))
    for name, p in module.named_parameters():
        if isinstance(p, DTensor):
            share = shared if name.startswith("expert") else comm.rank("data") + 1
            whole = numbers(name)
            for axis, dim in SHARDS[name].items():
                whole = whole.chunk(comm.size(axis), dim)[comm.rank(axis)]
            loss = loss + (module.local(name) * whole).sum() * share
    loss.backward()
    return module, topology


def mean_share(world_size: int, tensor: int) -> float:
    """(1/D) Σ (d + 1): what every reduced gradient is, in numbers; of experts and of all others."""
    return (world_size // tensor + 1) / 2


def optimizer_of(module: nn.Module, topology: Topology, zero: bool, **options: Any) -> ShardedOptimizer:
    names = {p: name for name, p in module.named_parameters()}
    plain = torch.optim.SGD(module.parameters(), lr=1.0)
    return ShardedOptimizer(plain, topology.comm, names, zero=zero, tile=None, **options)


def reduced(tensor: int, expert: int, zero: bool, bucket: int) -> tuple[dict[str, Tensor], list[tuple[str, str, int]]]:
    module, topology = example(tensor, expert)
    calls: list[tuple[str, str, int]] = []
    optimizer = optimizer_of(module, topology, zero, bucket_elements=bucket)
    handle = topology.comm.register_hook(
        lambda c, when: calls.append((c.op, c.kind, c.shape.numel())) if when == "end" else None
    )
    optimizer.reduce_gradients()
    handle.remove()
    assert all(p.grad is None for p in module.parameters())
    return {name: full(gradient) for name, gradient in optimizer.gradients().items()}, calls


Layout = tuple[int, int, int]
Of = Callable[[Layout], dict[Any, list[Any]]]  # by a layout: results of its processes, by case
LARGE, SMALL = 1 << 24, (1, 13, 20)  # elements of a bucket


@pytest.fixture(scope="module")
def reductions(pool: WorkerPool) -> Of:
    """What ``reduced`` returns by ``zero`` and ``bucket``; the cases of a layout share a world."""

    @cache
    def of(layout: Layout) -> dict[Any, list[Any]]:
        cases = [(True, LARGE), (False, LARGE), *((True, bucket) for bucket in SMALL if layout == LAYOUTS[-1])]
        made = pool.run_each(layout[0], reduced, [(*layout[1:], *case) for case in cases])
        return dict(zip(cases, made, strict=True))

    return of


@pytest.mark.parametrize("zero", [True, False], ids=["zero", "replicated"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_of_all_kinds_are_the_mean_over_data_ranks(reductions: Of, layout: Layout, zero: bool) -> None:
    world_size, *degrees = layout
    for whole, calls in reductions(layout)[zero, LARGE]:
        assert whole.keys() == {*SHAPES, "plain"}  # what no process used has none
        for name, gradient in whole.items():
            torch.testing.assert_close(gradient, mean_share(world_size, degrees[0]) * numbers(name))
        assert {op for op, *_ in calls} <= {"reduce_scatter" if zero else "all_reduce"}


def test_expert_gradient_is_divided_by_data_not_expert_data(reductions: Of) -> None:
    """In numbers: 4 data ranks, 2 replicas; an expert has met 1 + 2 in one and 3 + 4 in the other: 10 / 4."""
    for whole, _ in reductions((8, 2, 2))[True, LARGE]:
        torch.testing.assert_close(whole["experts"], 2.5 * numbers("experts"))


def test_small_buckets_mean_more_calls_but_the_same_values(reductions: Of) -> None:
    made = reductions((8, 2, 2))
    for bucket in SMALL:
        for (ours, calls), (theirs, once) in zip(made[True, bucket], made[True, LARGE], strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours:  # gloo may add in another order
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-14, atol=1e-15)
            assert len(calls) > len(once)


def mixed() -> tuple[set[torch.dtype], list[torch.dtype]]:
    topology, dtypes = Topology(ParallelDegrees(2)), []
    topology.comm.register_hook(
        lambda call, when: dtypes.append(call.dtype) if (call.tag, when) == ("gradients.reduce", "end") else None
    )
    module = nn.ParameterList(torch.zeros(3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for p in module:
        p.grad = torch.full_like(p, dist.get_rank() + 1.0)
    optimizer = optimizer_of(module, topology, True)
    optimizer.reduce_gradients()
    optimizer.step()
    for p in module:
        assert torch.equal(p.detach(), torch.full_like(p, -1.5))
    return {b.master.dtype for b in optimizer.buckets}, dtypes


def test_gradients_of_each_dtype_are_reduced_in_it_and_stepped_in_fp32(pool: WorkerPool) -> None:
    for masters, dtypes in pool.run(2, mixed):
        assert masters == {torch.float32}
        assert set(dtypes) == {torch.float32, torch.bfloat16}


def norm_and_update(tensor: int, expert: int, zero: bool) -> dict[float, tuple[float, dict[str, Tensor]]]:
    """By the largest norm allowed, one that binds and one that does not: the norm, and by how much one step of gradient
    descent with a learning rate of 1 moves each weight.
    """
    found = {}
    for max_norm in (0.7, 1e3):
        module, topology = example(tensor, expert)
        optimizer = optimizer_of(module, topology, zero, piece=7)  # so that norms are taken of several
        optimizer.reduce_gradients()
        before = {name: full(p) for name, p in module.named_parameters()}
        optimizer.clip(max_norm)
        norm = optimizer.global_norm()
        optimizer.step()
        found[max_norm] = norm, {name: before[name] - full(p) for name, p in module.named_parameters()}
    return found


@pytest.fixture(scope="module")
def norms(pool: WorkerPool) -> Of:
    """What ``norm_and_update`` returns by ``zero``."""

    @cache
    def of(layout: Layout) -> dict[Any, list[Any]]:
        made = pool.run_each(layout[0], norm_and_update, [(*layout[1:], zero) for zero in (True, False)])
        return dict(zip((True, False), made, strict=True))

    return of


@pytest.mark.parametrize("zero", [True, False], ids=["zero", "replicated"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_norm_counts_every_element_once_and_clipping_scales_to_it(norms: Of, layout: Layout, zero: bool) -> None:
    world_size, *degrees = layout
    share = mean_share(world_size, degrees[0])
    elements = torch.cat([share * numbers(name).flatten() for name in (*SHAPES, "plain")])
    for found in norms(layout)[zero]:
        for max_norm, (norm, update) in found.items():
            assert norm == pytest.approx(elements.norm().item(), rel=1e-12)
            factor = min(1.0, max_norm / (norm + 1e-6))
            for name in (*SHAPES, "plain"):
                torch.testing.assert_close(update[name], share * numbers(name) * factor, rtol=1e-12, atol=1e-15)
            assert not update["unused"].any()


def no_gradients() -> float:
    topology = Topology(ParallelDegrees(2))
    module = Example(topology)
    optimizer = optimizer_of(module, topology, True)
    optimizer.reduce_gradients()
    optimizer.clip(1.0)
    optimizer.step()
    return optimizer.global_norm()


def test_no_gradients_at_all_have_norm_zero(pool: WorkerPool) -> None:
    assert pool.run(2, no_gradients) == [0.0, 0.0]


def overflowed_and_clipped_twice() -> float:
    topology = Topology(ParallelDegrees(1))
    module = Example(topology)
    optimizer = optimizer_of(module, topology, True)
    (module.plain * torch.inf).sum().backward()
    optimizer.reduce_gradients()
    optimizer.clip(1.0)
    optimizer.clip_values(0.5)
    return optimizer.global_norm()


def test_an_overflow_may_be_clipped_by_norm_and_then_by_value(pool: WorkerPool) -> None:
    assert pool.run(1, overflowed_and_clipped_twice) == [torch.inf]


def twice() -> tuple[Tensor, Tensor]:
    """The gradient of a parameter that each tensor rank used for its own tokens, of one backward pass and of two."""
    module, topology = example(2, 1)
    optimizer = optimizer_of(module, topology, True, partial={module.replicated})
    optimizer.reduce_gradients()
    once = full(optimizer.gradients()["replicated"])
    (module.local("replicated") * numbers("replicated")).sum().backward()
    optimizer.reduce_gradients()
    return once, full(optimizer.gradients()["replicated"])


def test_partial_sums_of_several_backward_passes_are_each_summed_once(pool: WorkerPool) -> None:
    """In numbers, of 2 data × 2 tensor ranks: (1 + 2) · 2 / 2 = 3; a second pass adds (1 + 1) · 2 / 2 = 2."""
    for once, both in pool.run(4, twice):
        torch.testing.assert_close(once, 3 * numbers("replicated"))
        torch.testing.assert_close(both, 5 * numbers("replicated"))


# ---- what a step moves -----------------------------------------------------------------------------------------------


def bytes_moved(sizes: list[int], bucket: int, factor: float) -> dict[str, float]:
    """Bytes by part of a step of one rank, for each element of its parameters, in fp32."""
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    topology, moved = Topology(ParallelDegrees(dist.get_world_size())), {}
    optimizer = optimizer_of(nn.ParameterList(parameters), topology, True, bucket_elements=bucket)
    for p in parameters:
        p.grad = torch.ones_like(p)
    held = {p.grad.data_ptr() for p in parameters if p.grad is not None}
    steps = {
        "reduction": optimizer.reduce_gradients,
        "norm": optimizer.global_norm,
        "step": lambda: (optimizer.clip(factor * optimizer.global_norm()), optimizer.optimizer.step()),
    }
    for name, part in steps.items():
        with torch.no_grad(), Moved() as counter:
            part()
        moved[name] = counter.bytes / sum(sizes)
        if name == "reduction":
            kept = {b.gradient.data_ptr() for b in optimizer.buckets if b.gradient is not None}
            moved["gradients in place"] = float(kept == held)
    return moved


def test_a_gradient_that_fills_a_bucket_moves_only_where_it_is_used(pool: WorkerPool) -> None:
    """SGD's step reads the parameter and the gradient and writes the parameter: 12 bytes of each element."""
    (alone,) = pool.run(1, bytes_moved, [4096, 8192], 4096, 2.0)
    assert alone == pytest.approx({"reduction": 0, "norm": 4, "step": 12, "gradients in place": 1}, abs=0.1)
    (together,) = pool.run(1, bytes_moved, [4096, 8192], LARGE, 2.0)
    assert together == pytest.approx({"reduction": 8, "norm": 4, "step": 12, "gradients in place": 0}, abs=0.1)
    (clipped,) = pool.run(1, bytes_moved, [4096, 8192], 4096, 0.5)
    assert clipped["step"] == pytest.approx(12 + 8, abs=0.1)  # the mean costs nothing more than this
    for shard in pool.run(2, bytes_moved, [4096, 8192], 4096, 0.5):
        assert shard == pytest.approx({"reduction": 0, "norm": 2, "step": 10, "gradients in place": 0}, abs=0.1)


class Sum(ShardedModule):
    def __init__(self, topology: Topology) -> None:
        super().__init__()
        for name in ("a", "b"):
            self.add_parameter(ParameterSpec(name, (1, 3), Init(std=1.0)), topology)


def twins() -> list[Tensor]:
    """The gradients of two parameters that are only added up, after two backward passes."""
    topology = Topology(ParallelDegrees(1))
    module = Sum(topology)
    initialize(module, seed=0)
    optimizer = optimizer_of(module, topology, True, bucket_elements=1)
    for _ in range(2):
        ((module.local("a") + module.local("b")) * torch.arange(3.0)).sum().backward()
    optimizer.reduce_gradients()
    optimizer.clip(0.1)
    return [b.gradient for b in optimizer.buckets if b.gradient is not None]


def test_parameters_that_are_added_up_do_not_share_their_gradients(pool: WorkerPool) -> None:
    (gradients,) = pool.run(1, twins)
    assert len(gradients) == 2
    for gradient in gradients:
        torch.testing.assert_close(gradient, 2 * torch.arange(3.0), rtol=0, atol=0)
