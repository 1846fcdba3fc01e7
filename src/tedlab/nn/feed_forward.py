"""The dense feed-forward layer, divided over the tensor group."""

import torch.nn.functional as F
from torch import Tensor, nn

from tedlab.nn.linear import ColumnParallelLinear, RowParallelLinear
from tedlab.nn.sharded import Init
from tedlab.topology import Topology


class FeedForward(nn.Module):
    """Linear, GELU, linear (GPT-3).

    Args:
        hidden: model width.
        ffn: inner width; the tensor degree must divide it.
        topology: where this process stands.
        init: initial weights of the first projection.
        out_init: initial weights of the second.
    """

    def __init__(self, hidden: int, ffn: int, topology: Topology, *, init: Init, out_init: Init) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(hidden, ffn, topology, tag="feed_forward", init=init)
        self.down = RowParallelLinear(ffn, hidden, topology, tag="feed_forward", init=out_init)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) → (B, S, H)."""
        return self.down(F.gelu(self.up(x)))
