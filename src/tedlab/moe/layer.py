"""The MoE layer: router, token path, experts, and back."""

from typing import Any

from torch import Tensor, nn

from tedlab.comm.rows import Rows
from tedlab.config import MoEConfig
from tedlab.moe.deepspeed_gating import DeepSpeedRouter
from tedlab.moe.dispatch import token_path
from tedlab.moe.experts import Experts, RowExperts, SlotExperts
from tedlab.moe.local import LocalExperts
from tedlab.moe.ragged import RaggedPath, ragged_path
from tedlab.moe.router import Router, RouterReport
from tedlab.nn import Init
from tedlab.topology import Topology


class MoELayer(nn.Module):
    """Takes the place of a feed-forward layer (paper §2).

    Args:
        hidden: model width.
        ffn: inner width of an expert.
        config: experts, gating, choices, capacity or none.
        topology: where this process stands.
        experts: further arguments of :class:`Experts`: activation, biases, initial weights.
        init: initial weights of the router and of the experts' first projection.
    """

    def __init__(
        self, hidden: int, ffn: int, config: MoEConfig, topology: Topology, *, init: Init, **experts: Any
    ) -> None:
        super().__init__()
        router = Router if config.gating == "default" else DeepSpeedRouter
        self.router = router(hidden, config, topology, init=init)
        sizes = config.num_experts, hidden, ffn, topology
        self.path: Any = (
            None  # None: the experts are all here, and take tokens; otherwise these take what it hands them
        )
        self.experts: Experts
        if config.dispatch == "capacity":
            self.path, slots = token_path(config.num_experts, topology)
            self.experts = SlotExperts(slots, *sizes, init=init, **experts)
        elif topology.degrees.tensor == topology.degrees.expert == 1:
            self.experts = LocalExperts(config.kernel, *sizes, init=init, **experts)
        else:
            widths = hidden, ffn // topology.degrees.tensor
            self.path, rows = ragged_path(config.num_experts, widths, topology)
            self.experts = RowExperts(rows, *sizes, init=init, **experts)

    @property
    def moved(self) -> Rows | None:
        """Rows that a dropless layer has moved in training so far; None for one with capacity."""
        dropless = self.experts if self.path is None else self.path
        return dropless.moved if isinstance(dropless, LocalExperts | RaggedPath) else None

    def forward(self, x: Tensor) -> tuple[Tensor, RouterReport]:
        """Activations (B, S, H) → (B, S, H), and what the router did; S as on this tensor rank."""
        x_TH = x.flatten(0, 1)
        routing = self.router(x_TH, x.shape[1])
        if self.path is None:
            y_TH = self.experts(x_TH, routing)
        else:
            y_TH = self.path.combine(self.experts(self.path.dispatch(x_TH, routing)), routing)
        return y_TH.view_as(x), routing.report
