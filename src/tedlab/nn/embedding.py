"""Embedding tables: one divided by vocabulary over the tensor group, one replicated (for positions)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tedlab.comm import copy_to, reduce_from
from tedlab.nn.sharded import Init, ShardedModule
from tedlab.topology import Topology


class VocabParallelEmbedding(ShardedModule):
    """Token embedding with the vocabulary divided over the tensor group; also usable as a tied output projection.

    Args:
        vocab_size: number of tokens; the tensor degree must divide it.
        hidden: width of an embedding.
        topology: where this process stands.
        init: initial values.
    """

    def __init__(self, vocab_size: int, hidden: int, topology: Topology, *, init: Init) -> None:
        super().__init__()
        self.comm = topology.comm
        self.start = self.comm.rank("tensor") * (vocab_size // self.comm.size("tensor"))
        self.add_parameter(
            "weight", (vocab_size, hidden), topology.dense, init=init, device=topology.device, shards={"tensor": 0}
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, S) int64 → embeddings (B, S, H). Each rank looks up the ids it owns; the sum is the result."""
        weight = self.local("weight")  # (V/T, H)
        row = ids - self.start
        elsewhere = (row < 0) | (row >= weight.shape[0])
        found = F.embedding(row.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return reduce_from(found, self.comm, "tensor", "embedding.reduce")

    def logits(self, x: Tensor) -> Tensor:
        """Tied output projection: (B, S, H) → this rank's part of the logits (B, S, V/T)."""
        return F.linear(copy_to(x, self.comm, "tensor", "output.copy"), self.local("weight"))


class Embedding(ShardedModule):
    """A table of learned position embeddings, replicated over the tensor group."""

    def __init__(self, length: int, hidden: int, topology: Topology, *, init: Init) -> None:
        super().__init__()
        self.add_parameter("weight", (length, hidden), topology.dense, init=init, device=topology.device)

    def forward(self, length: int) -> Tensor:
        """Embeddings of positions 0 … length-1: (length, H)."""
        weight = self.local("weight")
        torch._check(length <= weight.shape[0], lambda: f"{length} positions, but the table has {weight.shape[0]}")
        return weight[:length]
