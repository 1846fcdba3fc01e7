"""Rotary positions (Su et al., 2021): queries and keys are rotated so that their products depend only on distances."""

import torch
from torch import Tensor


def rotation(length: int, head_dim: int, base: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Computes cosines and sines of the angles by which the features of each position turn.

    Args:
        length: Number of positions S.
        head_dim: Number of features of a head d; even.
        base: Feature pair i turns by base^(-2i/d) radians per position.
        device: Device of the result.
        dtype: Dtype of activations; the angles are in fp32 or better.

    Returns:
        (2, S, d/2).
    """
    precise = torch.promote_types(dtype, torch.float32)
    frequencies = base ** (torch.arange(0, head_dim, 2, device=device, dtype=precise) / -head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=precise), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Rotates each feature in the first half of the last dimension together with its counterpart in the second half.

    Args:
        x: (…, d); computation is in the dtype of ``by``, the result in that of ``x``.
        by: (2, …, d/2) from :func:`rotation`.
    """
    cos, sin = by
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
