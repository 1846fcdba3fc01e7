"""Rounds to bf16, to the nearest number or to one of both neighbours by chance, alike in every layout.

The random bits of an element depend on a seed, the step, and the element's number in the whole model, so no process and
no order matters, and a run that resumes draws what an uninterrupted one would.
"""

from enum import StrEnum

import torch
from torch import Tensor

Rounding = StrEnum("Rounding", "NEAREST STOCHASTIC")
_BITS = 16  # of fp32 that bf16 lacks
_ALL = (1 << 64) - 1
# SplitMix64 (Steele, Lea and Flood 2014): the increment, and the factors and shifts that mix a counter's bits.
_INCREMENT, _FACTORS, _SHIFTS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB), (30, 27, 31)


def random_bits(numbers: Tensor, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns two independent draws of 16 bits for each element.

    Args:
        numbers: (N,) int64, the numbers of elements.
        step: The step of the optimizer.
        seed: ``optim.optimizer.seed``.

    Returns:
        Two tensors (N,) int32, from 0 to 65,535.
    """
    x = numbers ^ _signed(_mixed(_mixed(seed) + step))
    for shift, factor in zip(_SHIFTS, (*_FACTORS, None), strict=True):
        x = x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))  # int64 shifts in copies of its sign
        x = x if factor is None else x * _signed(factor)
    low = (1 << _BITS) - 1
    return (x & low).int(), ((x >> _BITS) & low).int()


def to_bf16(values: Tensor, bits: Tensor | None = None) -> Tensor:
    """Rounds to bf16.

    Args:
        values: Any floating dtype; wider than fp32, they are first rounded to the nearest of that.
        bits: (…) int32 like ``values``, 16 random bits each, which make the upper neighbour in magnitude as likely as
            the value is close to it; None: the nearest neighbour. A number of bf16 stays as it is.

    Returns:
        bf16, less than one unit in the last place away from fp32; half of one without ``bits``.
    """
    if bits is None:
        return values.float().bfloat16()
    cut = (values.float().view(torch.int32) + bits) & -(1 << _BITS)
    return cut.view(torch.float32).bfloat16()


def _mixed(x: int) -> int:
    """Mixes the bits of a number of 64 bits."""
    x = (x + _INCREMENT) & _ALL
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        x = ((x ^ (x >> shift)) * factor) & _ALL
    return x ^ (x >> _SHIFTS[-1])


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
