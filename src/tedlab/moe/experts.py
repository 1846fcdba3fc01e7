"""The experts of one process, computed together, each divided over the expert-tensor group."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tedlab.comm import matmul_into
from tedlab.moe.dispatch import SlotRegion
from tedlab.moe.grouped import bias_rows, grouped_matmul
from tedlab.moe.ragged import RaggedRows, RowRegion, arrange
from tedlab.nn import Init, ShardedModule
from tedlab.topology import Topology


class Experts(ShardedModule):
    """The parameters of feed-forward experts: linear, GELU, linear.

    Divided over the expert group by expert, and inside by width.

    Args:
        num_experts: E, over all processes; the expert degree must divide it.
        hidden: model width.
        ffn: inner width of an expert; the tensor degree must divide it.
        topology: where this process stands.
        init: initial weights of the first projection.
        out_init: initial weights of the second.
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        ffn: int,
        topology: Topology,
        *,
        init: Init,
        out_init: Init,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        mesh, device = topology.expert, topology.device
        inner = {"expert": 0, "tensor": 2}
        self.add_parameter("up", (num_experts, hidden, ffn), mesh, init=init, device=device, shards=inner)
        self.add_parameter("up_bias", (num_experts, 1, ffn), mesh, init=Init(), device=device, shards=inner)
        self.add_parameter(
            "down", (num_experts, ffn, hidden), mesh, init=out_init, device=device, shards={"expert": 0, "tensor": 1}
        )
        self.add_parameter(
            "down_bias", (num_experts, 1, hidden), mesh, init=Init(), device=device, shards={"expert": 0}
        )


class SlotExperts(Experts):
    """Experts of as many slots each.

    Args:
        region: the way of slots into the computation and of results out of it.
        arguments: of :class:`Experts`.
    """

    def __init__(self, region: SlotRegion, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.region = region

    def forward(self, x_eNH: Tensor) -> Tensor:
        """Slots of this process's experts (e, N, H) → their results (e, N, H)."""
        x_eNH = self.region.enter(x_eNH)
        h_eNF = F.gelu(torch.baddbmm(self.local("up_bias"), x_eNH, self.local("up")))
        return self.region.leave(matmul_into(h_eNF, self.local("down"), "experts.reduce"), self.local("down_bias"))


class RowExperts(Experts):
    """Experts of as many rows as were chosen for each.

    Args:
        region: the way of rows into the computation and of results out of it.
        arguments: of :class:`Experts`.
    """

    def __init__(self, region: RowRegion, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.region = region

    def forward(self, x: RaggedRows) -> RaggedRows:
        """Rows of this process's experts → their results, which go back the way they came."""
        arrangement = arrange(x.exchange)
        groups = arrangement.groups
        x_NH = self.region.enter(x, arrangement)
        up_NF = grouped_matmul(x_NH, self.local("up"), groups)
        h_NF = F.gelu(up_NF + bias_rows(self.local("up_bias").squeeze(1), groups, up_NF.dtype))
        partial_NH = grouped_matmul(h_NF, self.local("down"), groups, "experts.reduce")
        bias_NH = bias_rows(self.local("down_bias").squeeze(1), groups, partial_NH.dtype)
        return RaggedRows(self.region.leave(partial_NH, bias_NH, x.exchange, arrangement), x.exchange)
