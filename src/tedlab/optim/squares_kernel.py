"""The GPU kernel that sums squares. It needs Triton and is imported only where it runs."""

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

_BLOCK, _BLOCKS = 1024, 16  # elements that a program reads at a time, and how many times


def launch(x: Tensor) -> Tensor:
    """Returns sums of squares in fp64, each of up to 16,384 elements of a flat fp32 tensor.

    The order of summation is fixed, so that results repeat.
    """
    size = x.numel()
    sums = torch.empty(max(1, triton.cdiv(size, _BLOCK * _BLOCKS)), dtype=torch.float64, device=x.device)
    _squares[(len(sums),)](x.contiguous(), sums, size, BLOCK=_BLOCK, BLOCKS=_BLOCKS)
    return sums


@triton.jit
def _added(a, b):  # type: ignore[no-untyped-def]
    return a + b


@triton.jit
def _squares(x, sums, size, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    total = tl.full((BLOCK,), 0.0, tl.float64)
    for n in tl.static_range(BLOCKS):
        at = start + n * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, at < size, 0.0).to(tl.float64)
        total += value * value
    tl.store(sums + tl.program_id(0), tl.reduce(total, 0, _added))
