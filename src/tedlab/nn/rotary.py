"""Rotary positions (Su et al., 2021): queries and keys are rotated, so that their products know only distances."""

import torch
from torch import Tensor


def rotation(length: int, head_dim: int, base: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of the angles by which the features of each position turn.

    Args:
        length: S, number of positions.
        head_dim: d, features of a head; even.
        base: feature pair i turns by base^(-2i/d) at each position.
        device: of the result.
        dtype: of activations; the angles are in fp32 or better.

    Returns:
        (2, S, d/2).
    """
    precise = torch.promote_types(dtype, torch.float32)
    frequencies = base ** (torch.arange(0, head_dim, 2, device=device, dtype=precise) / -head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=precise), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Turns feature i of the first half of the last dimension with feature i of the second.

    Args:
        x: (…, d), computed in the dtype of ``by`` and returned in its own.
        by: (2, …, d/2), of :func:`rotation`.
    """
    cos, sin = by
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
