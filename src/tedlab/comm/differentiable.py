"""Collectives as differentiable functions, each with its adjoint spelt out.

torch's own autograd for functional collectives treats the result as a *different* tensor on every process; in tensor
parallelism it is the same tensor, held by all, and the adjoints differ. Hence these pairs (Megatron-LM calls the
first two f and g):

==================  ====================  =======================================
function            forward               backward
==================  ====================  =======================================
``copy_to``         identity              all-reduce of the gradient
``reduce_from``     all-reduce            identity
``slice_to``        this process's slice  all-gather of the gradient's slices
``gather_from``     all-gather            this process's slice of the gradient
``gather_to``       all-gather            reduce-scatter of the gradient
``scatter_from``    reduce-scatter        all-gather of the gradient's slices
``all_to_all``      all-to-all            all-to-all of the gradient
==================  ====================  =======================================

``…_to`` enters a region in which every process computes its own part of a joint result, ``…_from`` leaves one.
Collectives of the forward pass go through ``recompute.py``, which may have kept their results.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tedlab.comm.collectives import Collectives, Phase, Splits
from tedlab.comm.recompute import collective, is_dead, unused
from tedlab.degrees import GroupKind


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


def slice_to(x: Tensor, comm: Collectives, kind: GroupKind, tag: str, dim: int) -> Tensor:
    """Of the same ``x`` on every process of the group, each goes on with one of n equal slices along ``dim``.

    Forward: the slice. Backward: the slices' gradients are put together.
    """
    return x if comm.size(kind) == 1 else _SliceTo.apply(x, comm, kind, tag, dim)


def gather_from(x: Tensor, comm: Collectives, kind: GroupKind, tag: str, dim: int) -> Tensor:
    """The inverse of :func:`slice_to`: every process has the whole, and goes on to do the same with it as the others.

    Forward: all-gather along ``dim``. Backward: all hold the same gradient, of which each takes its slice.
    """
    return x if comm.size(kind) == 1 else _GatherFrom.apply(x, comm, kind, tag, dim)


def gather_to(x: Tensor, comm: Collectives, kind: GroupKind, tag: str, dim: int) -> Tensor:
    """:func:`gather_from` and :func:`copy_to` in one: every process uses the whole for its part of a joint result.

    Forward: all-gather along ``dim``. Backward: the gradient's parts are summed, and each process keeps its slice:
    reduce-scatter, half the bytes of an all-reduce.
    """
    return x if comm.size(kind) == 1 else _GatherTo.apply(x, comm, kind, tag, dim)


def scatter_from(
    x: Tensor, comm: Collectives, kind: GroupKind, tag: str, dim: int, bias: Tensor | None = None
) -> Tensor:
    """:func:`reduce_from`, plus a bias, and :func:`slice_to` in one: half the bytes of an all-reduce.

    Forward: reduce-scatter along ``dim``, and the bias, the same on every process: one that fits every slice, or one of
    the shape of ``x``. Backward: the gradient's slices are put together, for ``x`` and for the bias, whose gradient is
    thereby whole on every process.
    """
    if comm.size(kind) == 1:
        return x if bias is None else x + bias
    return _ScatterFrom.apply(x, bias, comm, kind, tag, dim)


def all_to_all(x: Tensor, comm: Collectives, kind: GroupKind, tag: str, splits: Splits | None = None) -> Tensor:
    """Exchanges slices along dimension 0: slice i goes to process i, what returns is in order of sender.

    Forward: all-to-all, with equal slices unless ``splits`` says otherwise. Backward: the all-to-all of the gradient
    that sends back what was received, since sending slice i to process i and receiving slice i from process i are each
    other's transpose.
    """
    return x if comm.size(kind) == 1 else _AllToAll.apply(x, comm, kind, tag, splits)


def matmul_into(x: Tensor, weight: Tensor, tag: str) -> Tensor:
    """``x @ weight`` for a product that only feeds the collective ``tag``.

    A second pass that does not repeat the collective does not compute the product either: of its inputs alone backward
    needs anything. Inputs are cast as autocast would; (…, n, k) × (k, m), or batched (e, n, k) × (e, k, m).
    """
    return _MatmulInto.apply(to_compute_dtype(x), to_compute_dtype(weight), tag)


def to_compute_dtype(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast computes matrix products in, if it is on: what is sent is no wider than that."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class _CopyTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Collectives, kind: GroupKind, tag: str) -> Tensor:
        ctx.call = comm, kind, tag
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        comm, kind, tag = ctx.call
        return comm.all_reduce(grads[0], kind, tag=tag, phase="backward"), None, None, None


class _ReduceFrom(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Collectives, kind: GroupKind, tag: str) -> Tensor:
        def launch(phase: Phase) -> Tensor:
            return comm.all_reduce(x, kind, tag=tag, phase=phase)

        return collective(comm, tag, launch, x.shape, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0], None, None, None


class _SliceTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Collectives, kind: GroupKind, tag: str, dim: int) -> Tensor:
        ctx.call = comm, kind, tag, dim
        return _own_slice(x, comm, kind, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        comm, kind, tag, dim = ctx.call
        return _gathered(grads[0], comm, kind, tag, dim, "backward"), None, None, None, None


class _GatherFrom(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Collectives, kind: GroupKind, tag: str, dim: int) -> Tensor:
        ctx.call = comm, kind, dim
        return _gathered_or_kept(x, comm, kind, tag, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _own_slice(grads[0], *ctx.call), None, None, None, None


class _GatherTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Collectives, kind: GroupKind, tag: str, dim: int) -> Tensor:
        ctx.call = comm, kind, tag, dim
        return _gathered_or_kept(x, comm, kind, tag, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        comm, kind, tag, dim = ctx.call
        return _scattered(grads[0], comm, kind, tag, dim, "backward"), None, None, None, None


class _ScatterFrom(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, comm: Collectives, kind: GroupKind, tag: str, dim: int
    ) -> Tensor:
        ctx.call = comm, kind, tag, dim
        ctx.bias_shape = None if bias is None else bias.shape
        shape = torch.Size(size // comm.size(kind) if i == dim else size for i, size in enumerate(x.shape))

        def launch(phase: Phase) -> Tensor:
            return _scattered(x, comm, kind, tag, dim, phase)

        summed = collective(comm, tag, launch, shape, x)
        if bias is not None and bias.shape == x.shape:
            bias = _own_slice(bias, comm, kind, dim)
        return summed if bias is None else summed + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        comm, kind, tag, dim = ctx.call
        whole = _gathered(grads[0], comm, kind, tag, dim, "backward")
        of_bias = None if ctx.bias_shape is None else whole.sum_to_size(ctx.bias_shape)
        return whole, of_bias, None, None, None, None


class _AllToAll(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Collectives, kind: GroupKind, tag: str, splits: Splits | None) -> Tensor:
        ctx.call = comm, kind, tag, splits

        def launch(phase: Phase) -> Tensor:
            return comm.all_to_all(x, kind, tag=tag, phase=phase, splits=splits)

        shape = x.shape if splits is None else torch.Size((sum(splits.received), *x.shape[1:]))
        return collective(comm, tag, launch, shape, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        comm, kind, tag, splits = ctx.call
        back = None if splits is None else splits.reverse
        return comm.all_to_all(grads[0], kind, tag=tag, phase="backward", splits=back), None, None, None, None


class _MatmulInto(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tag: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        if is_dead(tag):
            return unused(torch.Size((*x.shape[:-1], weight.shape[-1])), x)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        of_x = grads[0] @ weight.mT
        if weight.dim() == 2:  # the transpose of a parameter, whose gradient is to lie in memory as it does
            return of_x, (grads[0].flatten(0, -2).mT @ x.flatten(0, -2)).mT, None
        return of_x, x.mT @ grads[0], None


def _own_slice(x: Tensor, comm: Collectives, kind: GroupKind, dim: int) -> Tensor:
    return x.chunk(comm.size(kind), dim)[comm.rank(kind)].contiguous()


def _gathered(x: Tensor, comm: Collectives, kind: GroupKind, tag: str, dim: int, phase: Phase) -> Tensor:
    parts = comm.all_gather(x, kind, tag=tag, phase=phase).unflatten(0, (comm.size(kind), -1))
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def _gathered_or_kept(x: Tensor, comm: Collectives, kind: GroupKind, tag: str, dim: int) -> Tensor:
    shape = torch.Size(size * comm.size(kind) if i == dim else size for i, size in enumerate(x.shape))
    return collective(comm, tag, lambda phase: _gathered(x, comm, kind, tag, dim, phase), shape, x)


def _scattered(x: Tensor, comm: Collectives, kind: GroupKind, tag: str, dim: int, phase: Phase) -> Tensor:
    parts = x.unflatten(dim, (comm.size(kind), -1)).movedim(dim, 0).flatten(0, 1)
    return comm.reduce_scatter(parts, kind, tag=tag, phase=phase)
