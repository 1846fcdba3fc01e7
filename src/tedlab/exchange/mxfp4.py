"""MXFP4 (Open Compute Project, 2023), in which gpt-oss is published: four bits a number, and a power of two for 32."""

import torch
from torch import Tensor

BLOCK = 16  # bytes that share a scale
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by exponent and mantissa; the fourth bit is the sign
_BIAS = 127  # of the scales' exponents


def dequantised(blocks: Tensor, scales: Tensor) -> Tensor:
    """Returns the numbers of packed matrices, transposed, as gpt-oss's experts multiply them.

    All of them are exact in bfloat16.

    Args:
        blocks: (…, R, G, 16) uint8, of each byte the low half first.
        scales: (…, R, G) uint8.

    Returns:
        (…, 32·G, R) bfloat16.
    """
    table = torch.tensor((*_POSITIVE, *(-value for value in _POSITIVE)))
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), 1)  # by byte
    numbers = pairs[blocks.int()].flatten(-2)  # (…, R, G, 32)
    numbers = torch.ldexp(numbers, scales.int().sub_(_BIAS).unsqueeze(-1))
    return numbers.bfloat16().flatten(-2).mT
