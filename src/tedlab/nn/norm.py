"""Normalisation layers. Their parameters are replicated over the tensor group."""

import torch.nn.functional as F
from torch import Tensor

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
        return F.rms_norm(x, (self.hidden,), self.local("weight"), self.eps)


def norm_layer(kind: str, hidden: int, topology: Topology) -> LayerNorm | RMSNorm:
    """The one that ``model.norm`` names: ``layer`` or ``rms``."""
    return (RMSNorm if kind == "rms" else LayerNorm)(hidden, topology)
