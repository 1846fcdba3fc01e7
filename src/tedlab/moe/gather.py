"""Copies tokens to rows and sums rows to tokens, by index and without atomics, so that results repeat.

Legend as in ``router.py``, and R: rows, or slots of a queue, which may be empty. Rows that live between processes have
the same operations around them as those of one process (``products.py``): in plain torch, which the compiler can fuse,
or as kernels that pass over memory once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from tedlab.comm import to_compute_dtype
from tedlab.moe import row_ops
from tedlab.moe.grouped import Groups, bias_rows, sums_by_expert
from tedlab.moe.products import row_functions
from tedlab.moe.router import Routing
from tedlab.nn import Nonlinearity, activate


def spread_choices(x_TH: Tensor, routing: Routing, kernel: str = "torch") -> Tensor:
    """Copies tokens to the slots of their choices, sorted by expert and hence by rank; empty slots hold zeros."""
    token = routing.choice_EC.div(routing.slot_TK.shape[1], rounding_mode="floor")  # -1 stays -1
    return gather_rows(to_compute_dtype(x_TH), token, routing.slot_TK, kernel)


def grown(x: Tensor, rows: int) -> Tensor:
    """Pads (…, R, H) with rows of zeros up to so many rows."""
    missing = rows - x.shape[-2]
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def chosen_experts(routing: Routing) -> Tensor:
    """Returns the expert of each choice (T, K) int64, if experts take all choices."""
    load_E, slot_TK = routing.counts_E, routing.slot_TK
    each = torch.arange(len(load_E), device=load_E.device)
    return each.repeat_interleave(load_E, output_size=slot_TK.numel())[slot_TK]


def merge_choices(y: Tensor, routing: Routing, kernel: str = "torch") -> Tensor:
    """Returns each token's gate-weighted sum of its choices' results (T, H), which ``y`` holds by slot."""
    rows = row_functions(kernel, y)
    if rows is not row_ops:
        return _Merge.apply(y, routing.gate_TK, routing.slot_TK, routing.choice_EC, rows)
    y_TKH = gather_rows(y, routing.slot_TK.flatten(), routing.choice_EC.unsqueeze(1)).unflatten(
        0, routing.slot_TK.shape
    )
    return (y_TKH * routing.gate_TK.to(y.dtype).unsqueeze(-1)).sum(1)


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor, kernel: str = "torch") -> Tensor:
    """Gathers rows by index in both directions.

    Forward: ``out[m] = x[index[m]]``, or zeros where ``index[m]`` is -1. ``inverse[n]`` lists every m with
    ``index[m] = n``, padded with -1, so backward is ``grad_x[n] = Σ_r grad_out[inverse[n, r]]``.

    Args:
        x: (n, H).
        index: (m,) int64.
        inverse: (n, r) int64.
        kernel: See ``moe.kernel``.
    """
    return _GatherRows.apply(x, index, inverse, row_functions(kernel, x))


def sum_rows(y: Tensor, index: Tensor, inverse: Tensor, kernel: str = "torch") -> Tensor:
    """Sums rows by index, the transpose of :func:`gather_rows`.

    Forward: ``out[n] = Σ_r y[inverse[n, r]]``, where -1 adds nothing; backward: ``grad_y[m] = grad_out[index[m]]``.
    Nothing that a recomputed region could need is kept, so that its second pass may end before.

    Args:
        y: (m, H).
        index: (m,) int64.
        inverse: (n, r) int64.
        kernel: See ``moe.kernel``.
    """
    return _SumRows.apply(y, index, inverse, row_functions(kernel, y))


def activate_rows(z_NZ: Tensor, bias_eZ: Tensor | None, groups: Groups, how: Nonlinearity, kernel: str) -> Tensor:
    """Activates rows plus their experts' biases: (N, F). Fused, it keeps nothing but z for the backward pass.

    Args:
        z_NZ: First projections, sorted by expert.
        bias_eZ: Their experts' biases, if any.
        groups: Which expert each row belongs to.
        how: The activation.
        kernel: See ``moe.kernel``.
    """
    rows = row_functions(kernel, z_NZ)
    if rows is not row_ops:
        bias = None if bias_eZ is None else bias_eZ.to(z_NZ.dtype)
        return _Activate.apply(z_NZ, bias, groups.expert_N, how, rows)
    return activate(z_NZ if bias_eZ is None else z_NZ + bias_rows(bias_eZ, groups, z_NZ.dtype), how)


def project_slots(
    x_eNH: Tensor, up_eHZ: Tensor, bias_e1Z: Tensor | None, how: Nonlinearity, kernel: str = "torch"
) -> Tensor:
    """Applies each expert's first projection and the activation to its slots: (e, N, F).

    Fused, the activation adds the bias, and keeps nothing but its input for the backward pass.

    Args:
        x_eNH: Slots.
        up_eHZ: First projections.
        bias_e1Z: Their biases, if any.
        how: The activation.
        kernel: See ``moe.kernel``.
    """
    rows = row_functions(kernel, x_eNH)
    if rows is row_ops:
        z_eNZ = torch.bmm(x_eNH, up_eHZ) if bias_e1Z is None else torch.baddbmm(bias_e1Z, x_eNH, up_eHZ)
        return activate(z_eNZ, how)
    z_eNZ = torch.bmm(x_eNH, up_eHZ)
    experts, slots, _ = z_eNZ.shape
    bias_eZ = None if bias_e1Z is None else bias_e1Z.squeeze(1).to(z_eNZ.dtype)
    expert_N = torch.arange(experts * slots, device=z_eNZ.device).div_(slots, rounding_mode="floor")
    return _Activate.apply(z_eNZ.flatten(0, 1), bias_eZ, expert_N, how, rows).unflatten(0, (experts, slots))


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, rows: Any) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.rows = rows
        return rows.take(x, index, missing=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return ctx.rows.sums(grads[0], inverse), None, None, None


class _SumRows(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, index: Tensor, inverse: Tensor, rows: Any) -> Tensor:
        ctx.index, ctx.rows = index, rows
        return rows.sums(y, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.rows.take(grads[0], ctx.index), None, None, None


class _Merge(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate_TK: Tensor, slot_TK: Tensor, choice_R: Tensor, rows: Any) -> Tensor:
        ctx.save_for_backward(y, gate_TK, choice_R)
        ctx.rows = rows
        return rows.combine(y, slot_TK, gate_TK, None, slot_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, gate_TK, choice_R = ctx.saved_tensors
        return *ctx.rows.combine_backward(grads[0], y, gate_TK, choice_R), None, None, None


class _Activate(Function):
    @staticmethod
    def forward(ctx: Any, z_NZ: Tensor, bias_eZ: Tensor | None, expert_N: Tensor, how: Any, rows: Any) -> Tensor:
        ctx.save_for_backward(z_NZ, bias_eZ, expert_N)
        ctx.how, ctx.rows = how, rows
        return rows.hidden(z_NZ, bias_eZ, expert_N, how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, bias, expert_N = ctx.saved_tensors
        grad_z, *_ = ctx.rows.hidden_backward(grads[0].contiguous(), z, bias, expert_N, None, ctx.how)
        grad_bias = None if bias is None else sums_by_expert(grad_z, expert_N, len(bias))
        return grad_z, grad_bias, None, None, None
