"""Normalisation layers. Their parameters are replicated over the tensor group."""

import torch.nn.functional as F
from torch import Tensor

from tedlab.nn.sharded import Init, ShardedModule
from tedlab.topology import Topology


class LayerNorm(ShardedModule):
    """Layer normalisation over the last dimension (Ba et al., 2016), statistics in fp32 or better."""

    def __init__(self, hidden: int, topology: Topology, eps: float = 1e-5) -> None:
        super().__init__()
        self.hidden, self.eps = hidden, eps
        for name, mean in (("weight", 1.0), ("bias", 0.0)):
            self.add_parameter(
                name,
                (hidden,),
                topology.dense,
                init=Init(mean=mean),
                device=topology.device,
                partial=topology.sequence_sharded,
            )

    def forward(self, x: Tensor) -> Tensor:
        """(…, H) → (…, H)."""
        return F.layer_norm(x, (self.hidden,), self.local("weight"), self.local("bias"), self.eps)
