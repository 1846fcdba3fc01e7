"""Linear layers divided over the tensor group: by output features (column) and by input features (row)."""

import torch.nn.functional as F
from torch import Tensor

from tedlab.comm import copy_to, reduce_from
from tedlab.nn.sharded import Init, ShardedModule
from tedlab.topology import Topology


class ColumnParallelLinear(ShardedModule):
    """``x @ Wᵀ + b`` with the output features divided over the tensor group.

    Args:
        in_features: size of the last dimension of the input, which every tensor rank holds whole.
        out_features: global size of the output; the tensor degree must divide it.
        topology: where this process stands.
        tag: name of the layer in the record of collectives (``<tag>.copy``, in backward).
        init: initial weights; the bias starts at zero.
        bias: whether there is one.
    """

    def __init__(
        self, in_features: int, out_features: int, topology: Topology, *, tag: str, init: Init, bias: bool = True
    ) -> None:
        super().__init__()
        self.comm, self.tag = topology.comm, tag
        mesh, device = topology.dense, topology.device
        self.add_parameter("weight", (out_features, in_features), mesh, init=init, device=device, shards={"tensor": 0})
        if bias:
            self.add_parameter("bias", (out_features,), mesh, init=Init(), device=device, shards={"tensor": 0})

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features), the same on every tensor rank → (…, out_features / T), this rank's part."""
        x = copy_to(x, self.comm, "tensor", f"{self.tag}.copy")
        return F.linear(x, self.local("weight"), self.local("bias") if "bias" in self.inits else None)


class RowParallelLinear(ShardedModule):
    """``x @ Wᵀ + b`` with the input features divided over the tensor group.

    Args:
        in_features: global size of the input; the tensor degree must divide it.
        out_features: size of the last dimension of the output, which every tensor rank receives whole.
        topology: where this process stands.
        tag: name of the layer in the record of collectives (``<tag>.reduce``, in forward).
        init: initial weights; the bias starts at zero.
    """

    def __init__(self, in_features: int, out_features: int, topology: Topology, *, tag: str, init: Init) -> None:
        super().__init__()
        self.comm, self.tag = topology.comm, tag
        mesh, device = topology.dense, topology.device
        self.add_parameter("weight", (out_features, in_features), mesh, init=init, device=device, shards={"tensor": 1})
        self.add_parameter("bias", (out_features,), mesh, init=Init(), device=device)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features / T), this rank's part → (…, out_features), the same on every tensor rank."""
        y = reduce_from(F.linear(x, self.local("weight")), self.comm, "tensor", f"{self.tag}.reduce")
        return y + self.local("bias")  # once, after the sum: every rank adds the whole bias
