"""Collectives as differentiable functions, each with its adjoint spelt out.

torch's own autograd for functional collectives treats the result as a *different* tensor on every process; in tensor
parallelism it is the same tensor, held by all, and the adjoints differ. Hence these pairs (Megatron-LM calls the
first two f and g):

============== ========================= =========================
function       forward                   backward
============== ========================= =========================
``copy_to``    identity                  all-reduce of the gradient
``reduce_from`` all-reduce               identity
``all_to_all`` all-to-all                all-to-all of the gradient
============== ========================= =========================
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from tedlab.comm.collectives import Collectives, GroupKind


def copy_to(x: Tensor, comm: Collectives, kind: GroupKind, tag: str) -> Tensor:
    """Enters a region that the group computes jointly: each process uses the same ``x`` for its part of the result.

    Forward: ``x`` itself. Backward: each process holds the part of the gradient that its part of the result caused;
    the parts are summed over the group.
    """
    return x if comm.size(kind) == 1 else _CopyTo.apply(x, comm, kind, tag)


def reduce_from(x: Tensor, comm: Collectives, kind: GroupKind, tag: str) -> Tensor:
    """Leaves a region that the group computed jointly: the partial results ``x`` are summed over the group.

    Forward: all-reduce. Backward: the gradient of a sum is the gradient itself, which every process already holds.
    """
    return x if comm.size(kind) == 1 else _ReduceFrom.apply(x, comm, kind, tag)


def all_to_all(x: Tensor, comm: Collectives, kind: GroupKind, tag: str) -> Tensor:
    """Exchanges equal slices along dimension 0: slice i goes to process i, what returns is in order of sender.

    Forward: all-to-all. Backward: the same all-to-all of the gradient, since sending slice i to process i and
    receiving slice i from process i is its own transpose.
    """
    return x if comm.size(kind) == 1 else _AllToAll.apply(x, comm, kind, tag)


class _CopyTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Collectives, kind: GroupKind, tag: str) -> Tensor:
        ctx.call = comm, kind, tag
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        comm, kind, tag = ctx.call  # type: ignore[attr-defined]
        return comm.all_reduce(grads[0], kind, tag=tag, phase="backward"), None, None, None


class _ReduceFrom(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Collectives, kind: GroupKind, tag: str) -> Tensor:
        return comm.all_reduce(x, kind, tag=tag, phase="forward")

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0], None, None, None


class _AllToAll(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Collectives, kind: GroupKind, tag: str) -> Tensor:
        ctx.call = comm, kind, tag
        return comm.all_to_all(x, kind, tag=tag, phase="forward")

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        comm, kind, tag = ctx.call  # type: ignore[attr-defined]
        return comm.all_to_all(grads[0], kind, tag=tag, phase="backward"), None, None, None
