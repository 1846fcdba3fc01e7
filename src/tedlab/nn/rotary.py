"""Rotary positions (Su et al., 2021): queries and keys are rotated so that their products depend only on distances.

A model trained on short texts is stretched over longer ones by turning its slow pairs of features more slowly; the
scalings here are those that published models use (``model.rotary``).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tedlab.config import RotaryConfig, RotaryScaling
from tedlab.spec import MicroBatch, Work

_PLAIN = RotaryConfig()


def rotation(
    length: int, head_dim: int, base: float, device: torch.device, dtype: torch.dtype, rotary: RotaryConfig = _PLAIN
) -> Tensor:
    """Computes cosines and sines of the angles by which the features of each position turn.

    Args:
        length: Number of positions S.
        head_dim: Number of features of a head d; even.
        base: Feature pair i turns by base^(-2i/d) radians per position, unless ``rotary`` slows it.
        device: Device of the result.
        dtype: Dtype of activations; the angles are in fp32 or better.
        rotary: How positions are stretched.

    Returns:
        (2, S, d/2), times the factor on queries and keys that YaRN has.
    """
    precise = torch.promote_types(dtype, torch.float32)
    if rotary.scaling == RotaryScaling.NTK:
        assert rotary.original_length is not None
        longer = max(length, rotary.original_length) / rotary.original_length
        base *= (rotary.factor * longer - (rotary.factor - 1)) ** (head_dim / (head_dim - 2))
    frequencies = base ** (torch.arange(0, head_dim, 2, device=device, dtype=precise) / -head_dim)
    kept = _kept(frequencies, head_dim, base, rotary)
    if kept is not None:
        frequencies = frequencies * (kept + (1 - kept) / rotary.factor)
    angles = torch.outer(torch.arange(length, device=device, dtype=precise), frequencies)
    turns = torch.stack((angles.cos(), angles.sin()))
    factor = attention_factor(rotary)
    return turns if factor == 1 else turns * factor


def attention_factor(rotary: RotaryConfig) -> float:
    """Returns the factor on queries and keys, which YaRN makes of the factor of length (Peng et al., 2023)."""
    if rotary.scaling != RotaryScaling.YARN:
        return 1.0
    if rotary.attention_factor is not None:
        return rotary.attention_factor
    if rotary.mscale and rotary.mscale_all_dim:
        return _mscale(rotary.factor, rotary.mscale) / _mscale(rotary.factor, rotary.mscale_all_dim)
    return _mscale(rotary.factor, 1.0)


def latent_score_factor(rotary: RotaryConfig) -> float:
    """Returns the factor on the scores of latent attention, most of whose features are not rotated (DeepSeek)."""
    return _mscale(rotary.factor, rotary.mscale_all_dim) ** 2 if rotary.mscale_all_dim else 1.0


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _kept(frequencies: Tensor, head_dim: int, base: float, rotary: RotaryConfig) -> float | Tensor | None:
    """Returns which share of its frequency each pair keeps, while the rest is divided by the factor; None: all."""
    if rotary.scaling == RotaryScaling.LINEAR:
        return 0.0
    if rotary.scaling not in (RotaryScaling.YARN, RotaryScaling.LLAMA3):
        return None
    length = rotary.original_length
    assert length is not None
    if rotary.scaling == RotaryScaling.LLAMA3:
        turns = length * frequencies / (2 * math.pi)
        width = rotary.high_freq_factor - rotary.low_freq_factor
        return ((turns - rotary.low_freq_factor) / width).clamp(0, 1)

    def pair(turns: float) -> float:
        """The pair, a fraction, that turns so often over the original length."""
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(rotary.beta_fast), pair(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    pairs = torch.arange(head_dim // 2, device=frequencies.device, dtype=frequencies.dtype)
    return 1 - ((pairs - low) / width).clamp(0, 1)


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Rotates each feature in the first half of the last dimension together with its counterpart in the second half.

    Args:
        x: (…, d); computation is in the dtype of ``by``, the result in that of ``x``.
        by: (2, …, d/2) from :func:`rotation`.
    """
    cos, sin = by
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def rotate_forward(b: MicroBatch, elements: int) -> Iterator[Work]:
    """Yields the kernels of :func:`rotate` for so many elements, half of the features at a time."""
    if b.compiled:
        yield b.moved(2 * elements)
        return
    half = elements // 2
    for _ in range(4):
        yield b.moved(half, b.compute, b.precise, kernel="strided" if b.precise == b.compute else "promoted")
    for _ in range(2):  # difference, sum
        yield b.moved(3 * half, b.precise)
    yield b.moved(4 * half, b.precise, kernel="strided")  # both together
    if b.precise != b.compute:
        yield b.moved(2 * half, b.precise, b.compute)


def rotate_backward(b: MicroBatch, elements: int) -> Iterator[Work]:
    """Yields the kernels of the backward pass of :func:`rotate`."""
    if b.compiled:
        yield b.moved(2 * elements)
        return
    half = elements // 2
    for _ in range(5):  # of the difference, and of four products
        yield b.moved(2 * half, b.precise, kernel="strided")
    for _ in range(5 if b.precise != b.compute else 0):
        yield b.moved(half, b.precise, b.compute)
    for _ in range(2):  # sums of each half's gradients
        yield b.moved(3 * half)
    yield b.moved(4 * half, kernel="strided")  # both together
