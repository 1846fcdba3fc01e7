"""Products of rows, sorted by expert, with their experts' matrices; and rows of biases.

Legend as in ``ragged.py``: N rows of e experts.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from tedlab.comm import to_compute_dtype
from tedlab.comm.recompute import is_dead, unused
from tedlab.spec import Kernel

_ALIGNMENT = 8  # bf16 numbers in 16 bytes


class Groups(NamedTuple):
    """Which expert each row belongs to.

    Attributes:
        expert_N: (N,) int64, the expert of each row, ascending; -1 behind the last, where rows may be left as they are.
        ends: (e,) int32, the end of each expert's rows.
        sizes: Number of rows of each expert; None: the host does not know it, and products must not need it.
    """

    expert_N: Tensor
    ends: Tensor
    sizes: tuple[int, ...] | None

    def divided(self, experts: int) -> "tuple[Groups, Groups]":
        """Returns the groups of the first so many experts, and those of the others. The host must know sizes."""
        assert self.sizes is not None
        rows = sum(self.sizes[:experts])
        first = Groups(self.expert_N[:rows], self.ends[:experts], self.sizes[:experts])
        others = Groups(self.expert_N[rows:] - experts, self.ends[experts:] - rows, self.sizes[experts:])
        return first, others


_joined = True
Together = Callable[[Kernel], AbstractContextManager[Any]]
_together: Together = nullcontext


@contextmanager
def one_by_one(together: Together = nullcontext) -> Iterator[None]:
    """Computes one ordinary torch product per expert inside the context, with shapes and FLOPs that tools know.

    Args:
        together: Makes a context for those products that are this one kernel elsewhere.
    """
    global _joined, _together
    before = _joined, _together
    _joined, _together = False, together
    try:
        yield
    finally:
        _joined, _together = before


def one_kernel(x: Tensor, *widths: int) -> bool:
    """Tells whether the products of rows are one kernel: :func:`native`, unless inside :func:`one_by_one`."""
    return _joined and native(x.dtype, *widths)


def native(dtype: torch.dtype, *widths: int) -> bool:
    """Tells whether torch multiplies groups of rows in one kernel, for which the host need not know their sizes.

    Args:
        dtype: Dtype of the rows.
        widths: Widths of the matrices.
    """
    return dtype is torch.bfloat16 and not any(width % _ALIGNMENT for width in widths)


def grouped_matmul(
    x_NK: Tensor, weight_eKM: Tensor, groups: Groups, tag: str | None = None, more_bKM: Tensor | None = None
) -> Tensor:
    """Multiplies each row by the matrix of its expert: (N, M). Inputs are cast as autocast would.

    Args:
        x_NK: Rows, sorted by expert.
        weight_eKM: Matrices of the experts.
        groups: Which expert each row belongs to.
        tag: Tag of the collective that the product feeds, if nothing else; see :func:`tedlab.comm.matmul_into`.
        more_bKM: Matrices of further experts, whose rows follow. Two tensors spare a copy of the first.
    """
    more = None if more_bKM is None else to_compute_dtype(more_bKM)
    return _GroupedMatmul.apply(to_compute_dtype(x_NK), to_compute_dtype(weight_eKM), more, groups, tag)


def bias_rows(bias_eF: Tensor, groups: Groups, dtype: torch.dtype) -> Tensor:
    """Returns the bias of each row's expert: (N, F)."""
    return _BiasRows.apply(bias_eF.to(dtype), groups.expert_N)


def add_bias(partial_NF: Tensor, bias_eF: Tensor, groups: Groups, adds: bool) -> Tensor:
    """Adds the bias of each row's expert to rows that a group sums later, which one of its processes does for all.

    Forward: the sum if ``adds``, otherwise the rows. Backward: if every process of the group has the gradient of the
    whole sum, as here, that of the bias is whole on every process, too.

    Args:
        partial_NF: This process's part of the rows.
        bias_eF: The experts' biases.
        groups: Which expert each row belongs to.
        adds: Whether this process is the one.
    """
    return _AddBias.apply(partial_NF, bias_eF.to(partial_NF.dtype), groups.expert_N, adds)


class _GroupedMatmul(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, more: Tensor | None, groups: Groups, tag: str | None) -> Tensor:
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if trained else None, weight, more)  # a frozen weight gets no gradient
        ctx.groups = groups
        if tag is not None and is_dead(tag):
            return unused(torch.Size((len(x), weight.shape[-1])), x)
        return _times(x, weight, more, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, more = ctx.saved_tensors
        grad, groups = grads[0].contiguous(), ctx.groups
        of_x = _times(grad, weight.mT, None if more is None else more.mT, groups)
        if x is None:
            return of_x, None, None, None, None
        if more is None:
            return of_x, transposed_times(x, grad, groups), None, None, None
        parts = groups.divided(len(weight))
        rows = [len(part.expert_N) for part in parts]
        of_weights = (
            transposed_times(x_part, grad_part, part)
            for x_part, grad_part, part in zip(x.split(rows), grad.split(rows), parts, strict=True)
        )
        return of_x, *of_weights, None, None


def _times(x: Tensor, weight: Tensor, more: Tensor | None, groups: Groups) -> Tensor:
    if more is None:
        return times(x, weight, groups)
    first, others = groups.divided(len(weight))
    own = len(first.expert_N)
    if one_kernel(x, x.shape[-1], weight.shape[-1]):
        out = F.grouped_mm(x, weight, offs=first.ends)  # room for all rows, of which it leaves the last as they are
    else:
        out = x.new_empty(len(x), weight.shape[-1])
        times(x[:own], weight, first, out[:own])
    times(x[own:], more, others, out[own:])
    return out


def times(x: Tensor, weight: Tensor, groups: Groups, out: Tensor | None = None) -> Tensor:
    """Multiplies each row (N, K) by the matrix (K, M) of its expert: (N, M), in ``out`` if it is given."""
    if one_kernel(x, x.shape[-1], weight.shape[-1]):
        result = F.grouped_mm(x, weight, offs=groups.ends)
        return result if out is None else out.copy_(result)
    assert groups.sizes is not None
    out = x.new_empty(len(x), weight.shape[-1]) if out is None else out
    with _each("grouped", x, weight.shape[-1], groups.sizes):
        for rows, matrix, result in zip(_divided(x, groups.sizes), weight, _divided(out, groups.sizes), strict=True):
            torch.mm(rows, matrix, out=result)
    return out


def _divided(x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Returns the rows of each expert, without those behind the last."""
    return x[: sum(sizes)].split(sizes)


def transposed_times(x: Tensor, grad: Tensor, groups: Groups) -> Tensor:
    """Computes xᵀ @ grad for each expert's rows (N, K) and (N, M): (e, K, M), with zeros for experts without rows."""
    if one_kernel(x, x.shape[-1], grad.shape[-1]):
        return F.grouped_mm(x.mT, grad, offs=groups.ends)
    assert groups.sizes is not None
    out = x.new_empty(len(groups.sizes), x.shape[1], grad.shape[1])
    with _each("grouped_weights", x, grad.shape[-1], groups.sizes):
        for rows, of_rows, result in zip(_divided(x, groups.sizes), _divided(grad, groups.sizes), out, strict=True):
            torch.mm(rows.mT, of_rows, out=result)
    return out


def _each(name: str, x: Tensor, width: int, sizes: tuple[int, ...]) -> AbstractContextManager[Any]:
    if not native(x.dtype, x.shape[-1], width):
        return nullcontext()
    return _together(Kernel(name, sum(sizes) / len(sizes), min(x.shape[-1], width)))


def sums_by_expert(x_NF: Tensor, expert_N: Tensor, experts: int) -> Tensor:
    """Sums the rows of each expert: (e, F)."""
    each = torch.arange(experts, device=expert_N.device).unsqueeze(1)
    return (each == expert_N).to(x_NF.dtype) @ x_NF


class _BiasRows(Function):
    """Copies biases to rows; backward multiplies by an indicator matrix: no atomics, sums in fp32 or better."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, expert: Tensor) -> Tensor:
        ctx.save_for_backward(expert)
        ctx.experts = len(bias)
        return bias.index_select(0, expert)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (expert,) = ctx.saved_tensors
        return sums_by_expert(grads[0], expert, ctx.experts), None


class _AddBias(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, expert: Tensor, adds: bool) -> Tensor:
        ctx.save_for_backward(expert)
        ctx.experts = len(bias)
        return x + bias.index_select(0, expert) if adds else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (expert,) = ctx.saved_tensors
        return grads[0], sums_by_expert(grads[0], expert, ctx.experts), None, None
