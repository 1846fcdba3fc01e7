"""Stands in for torch's kernels of norms on a GPU, whose inside fake tensors elsewhere would show."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

Count = Callable[[Sequence[Tensor], Tensor | None], None]


class FusedNorm:
    """A norm that computes nothing, and counts what each of torch's kernels reads and writes.

    Those of torch's ``layer_norm_kernel.cu``, for RMSNorm as well, are: one forward, and two backward. The first of
    these reads the input and the gradient and writes that of the input (a row stays in the cache between its two
    loops); the other, for the gradients of weight and bias, reads both again.

    Args:
        count: Called with what a kernel reads, and with the large tensor that it writes, if there is one.
        compiled: Tells whether what is computed now is compiled.
    """

    def __init__(self, count: Count, compiled: Callable[[], bool]) -> None:
        self.count, self.compiled = count, compiled

    def __call__(self, x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
        """Maps (…, H) to (…, H), and keeps the input and one number for each row, two if there is a bias."""
        if bias is None and x.dtype != weight.dtype and not self.compiled():
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                return F.rms_norm(x, weight.shape, weight, eps)  # composed of other kernels, of which torch warns
        y: Tensor = _Norm.apply(x, weight, bias, self.count)
        return y


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, count: Count) -> Tensor:
        statistics = x.shape[:-1] if bias is None else (2, *x.shape[:-1])
        kept = x.new_empty(statistics, dtype=torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(x, weight, kept)
        ctx.count, ctx.bias = count, bias is not None
        y = torch.empty_like(x)
        count([x], y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, _ = ctx.saved_tensors
        of_x, of_weight = torch.empty_like(x), torch.empty_like(weight)
        ctx.count([x, grads[0]], of_x)
        if ctx.needs_input_grad[1]:
            ctx.count([x, grads[0]], None)
        return of_x, of_weight, torch.empty_like(weight) if ctx.bias else None, None
