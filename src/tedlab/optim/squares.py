"""Sums the squares of a gradient in one pass over memory, where the device can."""

import torch
from torch import Tensor


def sum_of_squares(x: Tensor, piece: int) -> Tensor:
    """Returns the sum of the squares of a flat tensor, a scalar in fp64.

    Half precision is summed in fp32, for which torch has a kernel; wider numbers are summed in fp64. fp32 on a GPU
    takes a Triton kernel, since torch would copy it to fp64 first. Elsewhere pieces keep that copy small.

    Args:
        x: Any floating dtype.
        piece: Number of elements of a piece.
    """
    if x.itemsize == 2:
        return torch.linalg.vector_norm(x, dtype=torch.float32).double().square()
    if x.is_cuda and x.dtype == torch.float32:
        from tedlab.optim.squares_kernel import launch  # only torch for GPUs includes Triton

        return launch(x).sum()
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in x.split(piece)]
    return torch.stack(norms).square().sum()
