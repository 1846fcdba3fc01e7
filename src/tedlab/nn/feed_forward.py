"""The dense feed-forward layer, divided over the tensor group."""

from torch import Tensor, nn

from tedlab.nn.activation import activate
from tedlab.nn.linear import ColumnParallelLinear, RowParallelLinear
from tedlab.nn.sharded import Init
from tedlab.topology import Topology


class FeedForward(nn.Module):
    """Linear, GELU, linear (GPT-3), or with SwiGLU (Shazeer, 2020): linear, SiLU of one half times the other, linear.

    The rows of SwiGLU's first projection are ordered feature by feature (gate and value of feature 0, then of feature
    1, …), so that an even division of the rows is a division by features in every layout.

    Args:
        hidden: model width.
        ffn: F, inner width; the tensor degree must divide it.
        topology: where this process stands.
        init: initial weights of the first projection.
        out_init: initial weights of the second.
        activation: ``gelu`` or ``swiglu``.
        bias: whether the projections have biases.
    """

    def __init__(
        self,
        hidden: int,
        ffn: int,
        topology: Topology,
        *,
        init: Init,
        out_init: Init,
        activation: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.gated = activation == "swiglu"
        inner = 2 * ffn if self.gated else ffn
        self.up = ColumnParallelLinear(hidden, inner, topology, tag="feed_forward", init=init, bias=bias)
        self.down = RowParallelLinear(ffn, hidden, topology, tag="feed_forward", init=out_init, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) → (B, S, H)."""
        return self.down(activate(self.up(x), self.gated))
