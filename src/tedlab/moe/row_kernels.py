"""The functions of ``row_ops.py`` as Triton kernels that each pass over memory once; imported only if there is Triton.

They take the same arguments, in bf16, fp16 or fp32 and of any strides, and compute in fp32. Sums have a fixed order and
no atomics.
"""

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from tedlab.nn import Nonlinearity

_COLUMNS = 1024  # elements of a row at a time


def take(x_TH: Tensor, token_N: Tensor, missing: bool = False) -> Tensor:
    """See :func:`tedlab.moe.row_ops.take`."""
    rows, width = len(token_N), x_TH.shape[1]
    out = x_TH.new_empty(rows, width)
    if rows:
        block = min(4 * _COLUMNS, triton.next_power_of_2(width))
        given = x_TH.contiguous(), token_N.contiguous()
        _take[(rows, triton.cdiv(width, block))](*given, out, width, MISSING=missing, BLOCK=block)
    return out


def sums(y_RH: Tensor, place_TK: Tensor) -> Tensor:
    """See :func:`tedlab.moe.row_ops.sums`."""
    return combine(y_RH, place_TK, None, None, place_TK)


def hidden(z_NZ: Tensor, bias_eZ: Tensor | None, expert_N: Tensor, how: Nonlinearity) -> Tensor:
    """See :func:`tedlab.moe.row_ops.hidden`."""
    rows, inner = len(z_NZ), z_NZ.shape[1] // (2 if how.gated else 1)
    out = z_NZ.new_empty(rows, inner)
    if rows:
        block = min(_COLUMNS, triton.next_power_of_2(inner))
        grid = (rows, triton.cdiv(inner, block))
        given = _contiguous(z_NZ, bias_eZ, expert_N)
        _hidden[grid](*given, out, inner, GATED=how.gated, LIMIT=_limit(how), BLOCK=block)
    return out


def hidden_backward(
    grad_NF: Tensor, z_NZ: Tensor, bias_eZ: Tensor | None, expert_N: Tensor, weight_N: Tensor | None, how: Nonlinearity
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`tedlab.moe.row_ops.hidden_backward`."""
    rows, inner = grad_NF.shape
    grad_z = z_NZ.new_empty(z_NZ.shape)
    weighted = grad_weight = None
    if weight_N is not None:
        weighted, grad_weight = grad_NF.new_empty(grad_NF.shape), weight_N.new_empty(rows)
    if rows:
        block = min(_COLUMNS, triton.next_power_of_2(inner))
        kind = {"GATED": how.gated, "LIMIT": _limit(how)}
        given = _contiguous(grad_NF, z_NZ, bias_eZ, expert_N, weight_N)
        _hidden_backward[(rows,)](*given, grad_z, weighted, grad_weight, inner, **kind, BLOCK=block)
    return grad_z, weighted, grad_weight


def combine(
    y_NH: Tensor, place_TK: Tensor, gate_TK: Tensor | None, bias_eH: Tensor | None, expert_TK: Tensor
) -> Tensor:
    """See :func:`tedlab.moe.row_ops.combine`."""
    (tokens, choices), width = place_TK.shape, y_NH.shape[1]
    out = y_NH.new_empty(tokens, width)
    if tokens:
        block = min(_COLUMNS, triton.next_power_of_2(width))
        grid = (tokens, triton.cdiv(width, block))
        given = _contiguous(y_NH, place_TK, gate_TK, bias_eH, expert_TK)
        _combine[grid](*given, out, width, CHOICES=choices, BLOCK=block)
    return out


def _limit(how: Nonlinearity) -> float:
    """Returns the bound of the clamped SwiGLU; 0 for another activation."""
    return how.limit if how.clamped else 0.0


def _contiguous(*given: Tensor | None) -> list[Tensor | None]:
    """Returns what kernels read, which compute addresses from shapes alone."""
    return [None if tensor is None else tensor.contiguous() for tensor in given]


def combine_backward(grad_TH: Tensor, y_RH: Tensor, gate_TK: Tensor, choice_R: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`tedlab.moe.row_ops.combine_backward`."""
    rows, width = y_RH.shape
    grad_y, grad_gate = y_RH.new_empty(y_RH.shape), gate_TK.new_zeros(gate_TK.shape)
    if rows:
        block = min(_COLUMNS, triton.next_power_of_2(width))
        given = _contiguous(grad_TH, y_RH, gate_TK, choice_R)
        _combine_backward[(rows,)](*given, grad_y, grad_gate, width, CHOICES=gate_TK.shape[1], BLOCK=block)
    return grad_y, grad_gate


@triton.jit
def _take(x, token, out, width, MISSING: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(token + row).to(tl.int64)
    there = at < tl.where(source >= 0, width, 0)
    values = tl.load(x + source * width + at, there, 0.0)
    tl.store(out + row * width + at, values, at < width if MISSING else there)


@triton.jit
def _gelu_and_slope(z):  # type: ignore[no-untyped-def]
    # Φ(z) = 1 - tail for z > 0, with erfc as a polynomial times exp(-z²/2) (Abramowitz & Stegun 7.1.26, off by 1.5e-7
    # at most), which the slope needs anyway: a library's erf would take longer than memory access does.
    density = tl.exp(-0.5 * z * z)
    t = 1.0 / (1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(z))
    series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    tail = 0.5 * series * density
    normal = tl.where(z > 0, 1.0 - tail, tail)
    return z * normal, normal + z * density * 0.3989422804014327


@triton.jit
def _hidden(  # type: ignore[no-untyped-def]
    z, bias, expert, out, inner, GATED: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    at = start + tl.arange(0, BLOCK)
    owner = tl.load(expert + row)
    if owner < 0:  # there is room for this row, but it is none
        return
    if GATED:
        pair = 2 * start + tl.arange(0, 2 * BLOCK)
        value = tl.load(z + row * 2 * inner + pair, pair < 2 * inner, 0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + owner * 2 * inner + pair, pair < 2 * inner, 0.0).to(tl.float32)
        gate, linear = tl.split(tl.reshape(value, (BLOCK, 2)))
        if LIMIT > 0:
            gate = tl.minimum(gate, LIMIT)
            linear = tl.minimum(tl.maximum(linear, -LIMIT), LIMIT) + 1.0
            result = gate * tl.sigmoid(1.702 * gate) * linear
        else:
            result = gate * tl.sigmoid(gate) * linear
    else:
        value = tl.load(z + row * inner + at, at < inner, 0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + owner * inner + at, at < inner, 0.0).to(tl.float32)
        result, _ = _gelu_and_slope(value)
    tl.store(out + row * inner + at, result.to(out.dtype.element_ty), at < inner)


@triton.jit
def _hidden_backward(  # type: ignore[no-untyped-def]
    grad,
    z,
    bias,
    expert,
    weight,
    grad_z,
    weighted,
    grad_weight,
    inner,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    w = 1.0 if weight is None else tl.load(weight + row).to(tl.float32)
    owner = tl.load(expert + row)
    if owner < 0:  # as in _hidden
        return
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, inner, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < inner
        d = tl.load(grad + row * inner + at, inside, 0.0).to(tl.float32)
        if GATED:
            pair = 2 * start + tl.arange(0, 2 * BLOCK)
            value = tl.load(z + row * 2 * inner + pair, pair < 2 * inner, 0.0).to(tl.float32)
            if bias is not None:
                value += tl.load(bias + owner * 2 * inner + pair, pair < 2 * inner, 0.0).to(tl.float32)
            gate, linear = tl.split(tl.reshape(value, (BLOCK, 2)))
            if LIMIT > 0:
                below, bounded = gate <= LIMIT, tl.abs(linear) <= LIMIT
                gate = tl.minimum(gate, LIMIT)
                linear = tl.minimum(tl.maximum(linear, -LIMIT), LIMIT) + 1.0
                sigmoid = tl.sigmoid(1.702 * gate)
                swish = gate * sigmoid
                slope = tl.where(below, linear * sigmoid * (1.0 + 1.702 * gate * (1.0 - sigmoid)), 0.0)
                of_linear = tl.where(bounded, swish, 0.0)
            else:
                sigmoid = tl.sigmoid(gate)
                swish = gate * sigmoid
                slope = linear * sigmoid * (1.0 + gate * (1.0 - sigmoid))
                of_linear = swish
            h = swish * linear
            both = tl.reshape(tl.join(w * d * slope, w * d * of_linear), (2 * BLOCK,))
            tl.store(grad_z + row * 2 * inner + pair, both.to(grad_z.dtype.element_ty), pair < 2 * inner)
        else:
            value = tl.load(z + row * inner + at, inside, 0.0).to(tl.float32)
            if bias is not None:
                value += tl.load(bias + owner * inner + at, inside, 0.0).to(tl.float32)
            h, slope = _gelu_and_slope(value)
            tl.store(grad_z + row * inner + at, (w * d * slope).to(grad_z.dtype.element_ty), inside)
        if weight is not None:
            tl.store(weighted + row * inner + at, (w * h).to(weighted.dtype.element_ty), inside)
            total += d * h
    if weight is not None:
        tl.store(grad_weight + row, tl.sum(total, 0).to(grad_weight.dtype.element_ty))


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    y, place, gate, bias, expert, out, width, CHOICES: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(CHOICES):
        choice = token * CHOICES + k
        source = tl.load(place + choice).to(tl.int64)
        value = tl.load(y + source * width + at, at < tl.where(source >= 0, width, 0), 0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + tl.load(expert + choice) * width + at, inside, 0.0).to(tl.float32)
        if gate is not None:
            value *= tl.load(gate + choice).to(tl.float32)
        total += value
    tl.store(out + token * width + at, total.to(out.dtype.element_ty), inside)


@triton.jit
def _combine_backward(  # type: ignore[no-untyped-def]
    grad, y, gate, choice, grad_y, grad_gate, width, CHOICES: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(choice + row)
    there = own >= 0
    token = own // CHOICES
    g = tl.load(gate + tl.where(there, own, 0)).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < tl.where(there, width, 0)
        d = tl.load(grad + token * width + at, inside, 0.0).to(tl.float32)
        total += d * tl.load(y + row * width + at, inside, 0.0).to(tl.float32)
        tl.store(grad_y + row * width + at, (g * d).to(grad_y.dtype.element_ty), at < width)
    if there:
        tl.store(grad_gate + own, tl.sum(total, 0).to(grad_gate.dtype.element_ty))
