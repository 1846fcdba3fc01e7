"""Stands in for torch's kernel of RMSNorm on a GPU, whose inside fake tensors elsewhere would show."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class FusedNorm:
    """A norm that computes nothing, and counts what each of torch's kernels reads and writes.

    Those of torch's ``layer_norm_kernel.cu`` are: one forward, and two backward. The first of these reads the input and
    the gradient and writes that of the input (a row stays in the cache between its two loops); the other, for the
    gradient of the weight, reads both again.

    Args:
        count: Called with all tensors that a kernel reads or writes.
    """

    def __init__(self, count: Callable[..., None]) -> None:
        self.count = count

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Maps (…, H) to (…, H), and keeps the input and one number for each row."""
        y: Tensor = _Norm.apply(x, weight, self.count)
        return y


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, count: Callable[..., None]) -> Tensor:
        scale = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(x, weight, scale)
        ctx.count = count
        y = torch.empty_like(x)
        count(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, _ = ctx.saved_tensors
        of_x, of_weight = torch.empty_like(x), torch.empty_like(weight)
        ctx.count(x, grads[0], of_x)
        if ctx.needs_input_grad[1]:
            ctx.count(x, grads[0])
        return of_x, of_weight, None
