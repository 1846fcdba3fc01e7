"""The operations on rows around the matrix products of local experts, in plain torch; GPUs use ``row_kernels.py``.

Legend as in ``router.py`` and ``ragged.py``: N = T·K rows sorted by expert, F inner width, Z width of the first
projection (F, or with a SwiGLU 2·F, where gate and linear part alternate).
"""

import math

import torch
from torch import Tensor

from tedlab.nn import Nonlinearity, activate
from tedlab.nn.activation import clamped_swiglu


def take(x_TH: Tensor, token_N: Tensor, missing: bool = False) -> Tensor:
    """Gathers rows by index: (N, H). With ``missing``, rows whose index is -1 hold zeros, otherwise anything."""
    if not missing:
        return x_TH.index_select(0, token_N.clamp(min=0))
    if not len(x_TH):  # all are missing
        return x_TH.new_zeros(len(token_N), x_TH.shape[1])
    return x_TH.index_select(0, token_N.clamp(min=0)).masked_fill_((token_N < 0).unsqueeze(1), 0.0)


def sums(y_RH: Tensor, place_TK: Tensor) -> Tensor:
    """Sums the rows that each token lists: (T, H). An index of -1 adds nothing."""
    columns = [take(y_RH, column, missing=True) for column in place_TK.unbind(1)]
    return sum(columns[1:], start=columns[0])


def hidden(z_NZ: Tensor, bias_eZ: Tensor | None, expert_N: Tensor, how: Nonlinearity) -> Tensor:
    """Activates each row plus its expert's bias: (N, F). Rows whose expert is -1 hold anything."""
    return activate(_biased(z_NZ, bias_eZ, expert_N), how)


def hidden_backward(
    grad_NF: Tensor, z_NZ: Tensor, bias_eZ: Tensor | None, expert_N: Tensor, weight_N: Tensor | None, how: Nonlinearity
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Computes the backward pass of ``weight · hidden(z)``, row by row.

    Args:
        grad_NF: Gradient of the weighted activations.
        z_NZ, bias_eZ, expert_N, how: See :func:`hidden`.
        weight_N: Weight of each row; None: 1.

    Returns:
        The gradient of z (N, Z), the weighted activations (N, F), and the weights' gradient (N,) in the weights' dtype;
        the last two are None if there are no weights.
    """
    z = _biased(z_NZ, bias_eZ, expert_N)
    precise = torch.promote_types(z.dtype, torch.float32)
    grad, z = grad_NF.to(precise), z.to(precise)
    weight = 1.0 if weight_N is None else weight_N.to(precise).unsqueeze(1)
    if how.clamped:
        h, slopes = clamped_swiglu(z, how.limit)
        grad_z = (grad * weight).repeat_interleave(2, -1) * slopes
    elif how.gated:
        gate, linear = z.unflatten(-1, (-1, 2)).unbind(-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        h = silu * linear
        slopes = torch.stack((linear * sigmoid * (1 + gate * (1 - sigmoid)), silu), -1).flatten(-2)
        grad_z = (grad * weight).repeat_interleave(2, -1) * slopes
    else:
        normal = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        h = z * normal
        grad_z = grad * weight * (normal + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))
    if weight_N is None:
        return grad_z.to(z_NZ.dtype), None, None
    return grad_z.to(z_NZ.dtype), (weight * h).to(z_NZ.dtype), (grad * h).sum(-1).to(weight_N.dtype)


def combine(
    y_NH: Tensor, place_TK: Tensor, gate_TK: Tensor | None, bias_eH: Tensor | None, expert_TK: Tensor
) -> Tensor:
    """Sums the results of each token's choices, weighted if gates are given: (T, H).

    Args:
        y_NH: Results.
        place_TK: Row of each choice's result; without a bias, -1 adds nothing.
        gate_TK: Weights; None: 1.
        bias_eH: Bias that is added to each choice's result before it is weighted.
        expert_TK: Expert of each choice, whose bias is added.
    """
    y_TKH = take(y_NH, place_TK.flatten(), missing=True).unflatten(0, place_TK.shape)
    precise = torch.promote_types(y_NH.dtype, torch.float32)
    y_TKH = y_TKH.to(precise)
    if bias_eH is not None:
        y_TKH = y_TKH + bias_eH.to(precise)[expert_TK]
    if gate_TK is not None:
        y_TKH = y_TKH * gate_TK.to(precise).unsqueeze(-1)
    return y_TKH.sum(1).to(y_NH.dtype)


def combine_backward(grad_TH: Tensor, y_RH: Tensor, gate_TK: Tensor, choice_R: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the backward pass of :func:`combine` with gates and without a bias.

    Args:
        grad_TH: Gradient of the sums.
        y_RH: Results.
        gate_TK: Weights.
        choice_R: The choice t·K + k whose result each row is; -1: of none.

    Returns:
        Gradients of the results (R, H) and of the weights (T, K).
    """
    precise = torch.promote_types(y_RH.dtype, torch.float32)
    grad_RH = take(grad_TH, choice_R.div(gate_TK.shape[1], rounding_mode="floor"), missing=True).to(precise)
    gate_R = take(gate_TK.flatten().unsqueeze(1), choice_R, missing=True).to(precise)
    own = choice_R >= 0
    grad_gate = torch.zeros_like(gate_TK).flatten()
    grad_gate[choice_R[own]] = (grad_RH * y_RH.to(precise)).sum(-1).to(gate_TK.dtype)[own]
    return (grad_RH * gate_R).to(y_RH.dtype), grad_gate.view_as(gate_TK)


def _biased(z: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    return z if bias is None else z + bias.index_select(0, expert.clamp(min=0))
