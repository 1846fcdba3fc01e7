"""The experts of one process, computed together, each divided over the expert-tensor group."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tedlab.comm import matmul_into
from tedlab.moe.dispatch import SlotRegion
from tedlab.moe.grouped import bias_rows, grouped_matmul
from tedlab.moe.ragged import RaggedRows, RowRegion, arrange
from tedlab.nn import ShardedModule, activate
from tedlab.spec import Init, ParameterSpec, Spec
from tedlab.topology import Topology


@dataclass(frozen=True)
class ExpertsSpec(Spec):
    """Of :class:`Experts`."""

    num_experts: int
    hidden: int
    ffn: int
    init: Init
    out_init: Init
    activation: str = "gelu"
    bias: bool = True

    def own(self) -> Iterator[ParameterSpec]:
        columns = 2 * self.ffn if self.activation == "swiglu" else self.ffn
        by_column, by_row = {"expert": 0, "tensor": 2}, {"expert": 0, "tensor": 1}
        yield ParameterSpec("up", (self.num_experts, self.hidden, columns), self.init, by_column, "expert")
        yield ParameterSpec("down", (self.num_experts, self.ffn, self.hidden), self.out_init, by_row, "expert")
        if self.bias:
            biases = (("up_bias", columns, by_column), ("down_bias", self.hidden, {"expert": 0}))
            for name, width, divided in biases:
                yield ParameterSpec(name, (self.num_experts, 1, width), Init(), divided, "expert", decayed=False)


class Experts(ShardedModule):
    """The parameters of feed-forward experts: linear, GELU, linear; or with SwiGLU in its place.

    Divided over the expert group by expert, and inside by width. The first projection of SwiGLU has gate and linear
    part in turn, so that an even division gives each process both.

    Args:
        num_experts: E, over all processes; the expert degree must divide it.
        hidden: model width.
        ffn: inner width of an expert; the tensor degree must divide it.
        topology: where this process stands.
        activation: gelu or swiglu.
        bias: whether the projections have biases.
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
        activation: str = "gelu",
        bias: bool = True,
        init: Init,
        out_init: Init,
    ) -> None:
        super().__init__()
        self.num_experts, self.comm = num_experts, topology.comm
        self.gated, self.bias = activation == "swiglu", bias
        self.widths = hidden, ffn // topology.degrees.tensor
        self.build(ExpertsSpec(num_experts, hidden, ffn, init, out_init, activation, bias), topology)

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """This process's part of both projections, each with its biases: (e, H, ·), (e, 1, ·), (e, ·, H), (e, 1, H)."""
        up_bias, down_bias = (self.local("up_bias"), self.local("down_bias")) if self.bias else (None, None)
        return self.local("up"), up_bias, self.local("down"), down_bias


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
        up, up_bias, down, down_bias = self.weights()
        x_eNH = self.region.enter(x_eNH)
        z_eNZ = torch.bmm(x_eNH, up) if up_bias is None else torch.baddbmm(up_bias, x_eNH, up)
        return self.region.leave(matmul_into(activate(z_eNZ, self.gated), down, "experts.reduce"), down_bias)


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
        up, up_bias, down, down_bias = self.weights()
        arrangement = arrange(x.exchange)
        groups = arrangement.groups
        x_NH = self.region.enter(x, arrangement)
        z_NZ = grouped_matmul(x_NH, up, groups)
        if up_bias is not None:
            z_NZ = z_NZ + bias_rows(up_bias.squeeze(1), groups, z_NZ.dtype)
        partial_NH = grouped_matmul(activate(z_NZ, self.gated), down, groups, "experts.reduce")
        bias_NH = None if down_bias is None else bias_rows(down_bias.squeeze(1), groups, partial_NH.dtype)
        return RaggedRows(self.region.leave(partial_NH, bias_NH, x.exchange, arrangement), x.exchange)
