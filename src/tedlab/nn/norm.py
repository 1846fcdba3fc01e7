"""Normalisation layers. Their parameters are replicated over the tensor group."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from tedlab.nn.sharded import Init, ShardedModule
from tedlab.topology import Topology


class _Norm(ShardedModule):
    """Over the last dimension, statistics in fp32 or better."""

    inits_of: dict[str, Init]

    def __init__(self, hidden: int, topology: Topology, eps: float = 1e-5) -> None:
        super().__init__()
        self.hidden, self.eps = hidden, eps
        for name, init in self.inits_of.items():
            self.add_parameter(
                name,
                (hidden,),
                topology.dense,
                init=init,
                device=topology.device,
                partial=topology.sequence_sharded,
            )


class LayerNorm(_Norm):
    """Layer normalisation (Ba et al., 2016)."""

    inits_of = {"weight": Init(mean=1.0), "bias": Init()}

    def forward(self, x: Tensor) -> Tensor:
        """(…, H) → (…, H)."""
        return F.layer_norm(x, (self.hidden,), self.local("weight"), self.local("bias"), self.eps)


class RMSNorm(_Norm):
    """Division by the root mean square (Zhang & Sennrich, 2019)."""

    inits_of = {"weight": Init(mean=1.0)}

    def forward(self, x: Tensor) -> Tensor:
        """(…, H) → (…, H)."""
        weight = self.local("weight")
        return F.rms_norm(x, (self.hidden,), weight, self.eps) if x.is_cuda else _RMSNorm.apply(x, weight, self.eps)


class _RMSNorm(Function):
    """``F.rms_norm``, which keeps its input and a number for each row.

    torch's keeps no more on GPUs, but elsewhere, where simulations of GPUs run as well, several tensors in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (precise.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (precise * scale * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad = grads[0].to(scale.dtype)
        normal = x * scale
        of_normal = grad * weight
        of_x = scale * (of_normal - normal * (of_normal * normal).mean(-1, keepdim=True))
        of_weight = (grad * normal).flatten(0, -2).sum(0)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None


def norm_layer(kind: str, hidden: int, topology: Topology) -> LayerNorm | RMSNorm:
    """The one that ``model.norm`` names: ``layer`` or ``rms``."""
    return (RMSNorm if kind == "rms" else LayerNorm)(hidden, topology)
