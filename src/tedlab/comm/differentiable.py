"""Collectives as differentiable functions, each with an explicit adjoint.

torch's own autograd for functional collectives treats the result as a *different* tensor on every process. In tensor
parallelism all processes hold the same tensor, which has other adjoints, so this module defines the following pairs
(Megatron-LM calls the first two f and g):

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
from tedlab.comm.recompute import collective, evaluating, is_dead, unused
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
    """Slices an ``x`` that is the same on all n processes, each of which continues with 1/n of it along ``dim``.

    Forward: this process's slice. Backward: all-gather of the slices' gradients.
    """
    return x if comm.size(kind) == 1 else _SliceTo.apply(x, comm, kind, tag, dim)


def gather_from(x: Tensor, comm: Collectives, kind: GroupKind, tag: str, dim: int) -> Tensor:
    """The inverse of :func:`slice_to`: every process gets the whole and computes the same from it as the others.

    Forward: all-gather along ``dim``. Backward: all processes hold the same gradient, and each takes its slice.
    """
    return x if comm.size(kind) == 1 else _GatherFrom.apply(x, comm, kind, tag, dim)


def gather_to(x: Tensor, comm: Collectives, kind: GroupKind, tag: str, dim: int) -> Tensor:
    """:func:`gather_from` and :func:`copy_to` in one: every process uses the whole for its part of a joint result.

    Forward: all-gather along ``dim``. Backward: reduce-scatter, which sums the parts of the gradient, leaves each
    process its slice, and moves half the bytes of an all-reduce.
    """
    return x if comm.size(kind) == 1 else _GatherTo.apply(x, comm, kind, tag, dim)


def scatter_from(
    x: Tensor, comm: Collectives, kind: GroupKind, tag: str, dim: int, bias: Tensor | None = None
) -> Tensor:
    """:func:`reduce_from`, a bias and :func:`slice_to` in one, with half the bytes of an all-reduce.

    Forward: reduce-scatter along ``dim``, then adds the bias, which is the same on every process and either broadcasts
    to every slice or has the shape of ``x``. Backward: all-gather of the gradient's slices, so that the gradients of
    ``x`` and of the bias are complete on every process.
    """
    if comm.size(kind) == 1:
        return x if bias is None else x + bias
    return _ScatterFrom.apply(x, bias, comm, kind, tag, dim)


def all_to_all(x: Tensor, comm: Collectives, kind: GroupKind, tag: str, splits: Splits | None = None) -> Tensor:
    """Exchanges slices along dimension 0: slice i goes to process i, and the result is in order of sender.

    Forward: all-to-all, with equal slices unless ``splits`` is given. Backward: the all-to-all that sends the gradient
    back the way it came, which is the transpose of the forward one.
    """
    return x if comm.size(kind) == 1 else _AllToAll.apply(x, comm, kind, tag, splits)


def matmul_into(x: Tensor, weight: Tensor, tag: str) -> Tensor:
    """Computes ``x @ weight`` for a product that only feeds the collective ``tag``.

    A second pass that does not repeat the collective skips the product, too, since backward needs only its inputs. They
    are cast as autocast would; shapes are (…, n, k) × (k, m), or batched (e, n, k) × (e, k, m).
    """
    x, weight = to_compute_dtype(x), to_compute_dtype(weight)
    return x @ weight if evaluating() else _MatmulInto.apply(x, weight, tag)


def to_compute_dtype(x: Tensor) -> Tensor:
    """Casts ``x`` to autocast's dtype for matrix products, if autocast is on, so that no wider data is sent."""
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
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # a frozen weight gets no gradient
        if is_dead(tag):
            return unused(torch.Size((*x.shape[:-1], weight.shape[-1])), x)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of_x = grads[0] @ weight.mT
        if x is None:
            return of_x, None, None
        if weight.dim() == 2:  # the transpose of a parameter; gives the gradient the parameter's memory layout
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
