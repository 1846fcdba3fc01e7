"""The product that makes a router's logits, in fp32 or better from inputs in any precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

_everywhere = False


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Multiplies fake tensors on a CPU as a GPU's tensor cores would."""
    global _everywhere
    before, _everywhere = _everywhere, True
    try:
        yield
    finally:
        _everywhere = before


class PreciseLinear(Function):
    """``F.linear`` in fp32 or better that keeps its input in its own dtype.

    Tensor cores multiply two bf16 numbers exactly and sum in fp32, so nothing needs to be converted. The gradient,
    which is fp32, is split into a sum of three bf16 numbers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if _on_tensor_cores(x, weight):
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        precise = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(precise), weight.to(precise))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad, wanted = grads[0], ctx.needs_input_grad[1]  # no gradient of a frozen weight
        if _on_tensor_cores(x, weight):
            parts = torch.cat(bf16_parts(grad), -1)  # (T, 3·E)
            of_x = torch.mm(parts, weight.repeat(3, 1), out_dtype=torch.float32)
            if not wanted:
                return of_x.to(x.dtype), None
            of_weight = torch.mm(parts.t(), x, out_dtype=torch.float32).unflatten(0, (3, -1)).sum(0)
            return of_x.to(x.dtype), of_weight.to(weight.dtype)
        of_weight = (grad.mT @ x.to(grad.dtype)).to(weight.dtype) if wanted else None
        return (grad @ weight.to(grad.dtype)).to(x.dtype), of_weight


def _on_tensor_cores(x: Tensor, weight: Tensor) -> bool:
    return (x.is_cuda or _everywhere) and x.dtype == weight.dtype == torch.bfloat16


def bf16_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Splits fp32 numbers, of 24 bits, into three bf16 numbers of 8 bits whose sum they are (unless near 1e-38)."""
    first = _first_bits(x)
    rest = x - first
    second = _first_bits(rest)
    return first.to(torch.bfloat16), second.to(torch.bfloat16), (rest - second).to(torch.bfloat16)


def _first_bits(x: Tensor) -> Tensor:
    """Clears the last 16 bits. torch.compile would optimise a conversion to bf16 and back away."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32)
