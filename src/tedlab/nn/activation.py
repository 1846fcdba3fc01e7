"""The activation between the two projections of a feed-forward layer or an expert."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from tedlab.config import Activation

STEEPNESS = 1.702  # of the clamped SwiGLU's sigmoid: x · σ(1.702·x) is close to GELU


class Nonlinearity(NamedTuple):
    """An activation.

    Attributes:
        name: ``gelu``, ``swiglu`` or ``clamped_swiglu``.
        limit: Bound of what the clamped SwiGLU multiplies.
    """

    name: str = Activation.GELU.value
    limit: float = 7.0

    @property
    def gated(self) -> bool:
        """Whether it makes one feature of two, a gate and a linear part."""
        return self.name != Activation.GELU

    @property
    def clamped(self) -> bool:
        """Whether it is the clamped SwiGLU."""
        return self.name == Activation.CLAMPED_SWIGLU


def activate(z: Tensor, how: Nonlinearity) -> Tensor:
    """Applies GELU to (…, F), or a SwiGLU to (…, 2·F), whose features alternate between gate and linear part.

    SwiGLU returns silu(gate) · linear part (Shazeer 2020, eq. 6). The clamped one, of gpt-oss, returns
    gate · σ(1.702·gate) · (linear part + 1), with the gate at most ``limit`` and the linear part between plus and
    minus ``limit``. The result is (…, F).
    """
    if not how.gated:
        return F.gelu(z)
    if how.clamped:
        return _ClampedSwiGLU.apply(z, how.limit)
    gate, linear = z.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gate) * linear


def activate_widely(z: Tensor, how: Nonlinearity) -> Tensor:
    """Does what :func:`activate` does, but applies SwiGLU's silu to all (…, 2·F), of which every second is of use.

    That is twice the work and memory, but of neighbours, which a CPU computes together: several times as fast. Results
    may differ in the last bit.
    """
    if not how.gated or how.clamped:
        return activate(z, how)
    silu, linear = F.silu(z)[..., ::2], z[..., 1::2]
    return silu * linear


def clamped_swiglu(z: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Returns the clamped SwiGLU (…, F) of z (…, 2·F), and its derivatives by z (…, 2·F)."""
    gate, linear = z.unflatten(-1, (-1, 2)).unbind(-1)
    below, inside = gate <= limit, linear.abs() <= limit
    gate, factor = gate.clamp(max=limit), linear.clamp(-limit, limit) + 1
    sigmoid = (STEEPNESS * gate).sigmoid()
    swish = gate * sigmoid
    of_gate = factor * sigmoid * (1 + STEEPNESS * gate * (1 - sigmoid)) * below
    return swish * factor, torch.stack((of_gate, swish * inside), -1).flatten(-2)


class _ClampedSwiGLU(Function):
    """Keeps its input alone: autograd would keep three times as much."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.limit = limit
        gate, linear = z.unflatten(-1, (-1, 2)).unbind(-1)
        gate = gate.clamp(max=limit)
        return gate * (STEEPNESS * gate).sigmoid() * (linear.clamp(-limit, limit) + 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return grads[0].repeat_interleave(2, -1) * clamped_swiglu(z, ctx.limit)[1], None
