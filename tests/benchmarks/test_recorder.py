"""The recorder of the benchmark beside DeepSpeed: one rule for whoever calls a collective, and however."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import _functional_collectives as funcol
from torch.utils.checkpoint import checkpoint

from benchmarks.recorder import CollectiveRecorder, Volume
from tests.pool import WorkerPool

BYTES = 4 * 24  # of the whole buffer


def test_both_kinds_of_call_count_alike_by_the_ring_algorithm(pool: WorkerPool) -> None:
    direct, functional = pool.run(4, call_everything)[0]
    assert direct == functional
    pair = {"all_reduce": BYTES, "all_gather": BYTES / 2, "reduce_scatter": BYTES / 2}  # 2 (n-1)/n or (n-1)/n
    assert direct == {
        **{("update", "tensor", operation): Volume(1, sent) for operation, sent in pair.items()},
        ("update", "expert", "all_to_all"): Volume(1, BYTES * 3 / 4),
    }


def call_everything() -> list[dict]:
    tensor, world = tensor_group(), dist.group.WORLD
    whole, part = torch.ones(24), torch.ones(12)

    def direct() -> None:
        dist.all_reduce(whole.clone(), group=tensor)
        dist.all_gather_into_tensor(whole.clone(), part, group=tensor)
        dist.reduce_scatter_tensor(part.clone(), whole, group=tensor)
        dist.all_to_all_single(whole.clone(), whole, group=world)

    def functional() -> None:
        funcol.all_reduce(whole, "sum", tensor).wait()
        funcol.all_gather_tensor(part, 0, tensor).wait()
        funcol.reduce_scatter_tensor(whole, "sum", 0, tensor).wait()
        funcol.all_to_all_single(whole, None, None, world).wait()

    return [recorded(direct), recorded(functional)]


def test_phases_are_told_apart_and_a_group_of_one_sends_nothing(pool: WorkerPool) -> None:
    assert pool.run(4, train_a_little)[0] == {
        ("forward", "tensor", "all_reduce"): Volume(1, BYTES),
        ("recompute", "tensor", "all_reduce"): Volume(1, BYTES),
        ("backward", "tensor", "all_reduce"): Volume(1, BYTES),
        ("update", "data", "all_reduce"): Volume(1, 0.0),
    }


def train_a_little() -> dict:
    group, alone = tensor_group(), dist.new_group([dist.get_rank()], use_local_synchronization=True)
    x = torch.ones(24, requires_grad=True)

    def step() -> None:
        # exp keeps the all-reduce's result for backward, so that recomputation has to come as far as that.
        checkpoint(lambda x: Reduce.apply(x, group).exp(), x, use_reentrant=False).sum().backward()
        dist.all_reduce(x.grad, group=alone)

    return recorded(step, in_forward=True)


class Reduce(Function):
    """Communicates in both directions."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return funcol.all_reduce(x, "sum", group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def test_an_unknown_collective_is_an_error(pool: WorkerPool) -> None:
    with pytest.raises(AssertionError, match="does not know: scatter_"):
        pool.run(2, scatter)


def scatter() -> None:
    parts = [torch.ones(1), torch.ones(1)] if dist.get_rank() == 0 else None
    recorded(lambda: dist.scatter(torch.empty(1), parts))


def tensor_group() -> dist.ProcessGroup:
    """Of two neighbours."""
    return dist.new_subgroups(2)[0]


def recorded(function, in_forward: bool = False) -> dict:
    first = dist.get_rank() // 2 * 2
    with CollectiveRecorder([first, first + 1]) as recorder:
        recorder.in_forward = in_forward
        function()
    return dict(recorder.volumes)
