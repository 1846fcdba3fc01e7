"""Causal self-attention with its heads divided over the tensor group."""

import torch.nn.functional as F
from torch import Tensor, nn

from tedlab.nn.linear import ColumnParallelLinear, RowParallelLinear
from tedlab.nn.sharded import Init
from tedlab.topology import Topology


class SelfAttention(nn.Module):
    """Multi-head causal self-attention (Vaswani et al., 2017), each tensor rank computing heads / T of the heads.

    The rows of the fused projection are ordered head by head (q, k, v of head 0, then of head 1, …), so that an even
    division of the rows is a division by heads in every layout.

    Args:
        hidden: model width, a multiple of ``heads``.
        heads: number of heads, a multiple of the tensor degree.
        topology: where this process stands.
        init: initial weights of the fused query-key-value projection.
        out_init: initial weights of the output projection.
    """

    def __init__(self, hidden: int, heads: int, topology: Topology, *, init: Init, out_init: Init) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.qkv = ColumnParallelLinear(hidden, 3 * hidden, topology, tag="attention", init=init)
        self.out = RowParallelLinear(hidden, hidden, topology, tag="attention", init=out_init)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) → (B, S, H)."""
        qkv = self.qkv(x).unflatten(-1, (-1, 3, self.head_dim))  # (B, S, heads/T, 3, head_dim)
        q, k, v = qkv.transpose(1, 2).unbind(-2)  # each (B, heads/T, S, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))
