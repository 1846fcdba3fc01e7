"""The MoE layer: router, token path, experts, and back."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tedlab.comm.rows import Rows
from tedlab.config import MoEConfig
from tedlab.moe.deepspeed_gating import DeepSpeedRouter
from tedlab.moe.dispatch import DispatchSpec, token_path
from tedlab.moe.experts import Experts, ExpertsSpec, RowExperts, SlotExperts
from tedlab.moe.local import LocalExperts
from tedlab.moe.ragged import RaggedPath, ragged_path
from tedlab.moe.router import Router, RouterReport, RouterSpec
from tedlab.nn import Layer
from tedlab.spec import Init, Spec
from tedlab.topology import Topology


@dataclass(frozen=True)
class MoESpec(Spec):
    """Of :class:`MoELayer`."""

    parts = ("router", "dispatch", "experts")
    hidden: int
    ffn: int
    config: MoEConfig
    init: Init
    out_init: Init
    activation: str = "gelu"
    bias: bool = True

    @property
    def router(self) -> RouterSpec:
        return RouterSpec(self.hidden, self.config, self.init)

    @property
    def dispatch(self) -> DispatchSpec:
        return DispatchSpec(self.hidden, self.config)

    @property
    def experts(self) -> ExpertsSpec:
        widths = self.config.num_experts, self.hidden, self.ffn
        return ExpertsSpec(*widths, self.init, self.out_init, self.activation, self.bias)


class MoELayer(Layer):
    """Takes the place of a feed-forward layer (paper §2).

    Args:
        hidden: model width.
        ffn: inner width of an expert.
        config: experts, gating, choices, capacity or none.
        topology: where this process stands.
        init: initial weights of the router and of the experts' first projection.
        out_init: initial weights of the experts' second projection.
        activation: of the experts, ``gelu`` or ``swiglu``.
        bias: whether their projections have biases.
    """

    def __init__(
        self,
        hidden: int,
        ffn: int,
        config: MoEConfig,
        topology: Topology,
        *,
        init: Init,
        out_init: Init,
        activation: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        spec = MoESpec(hidden, ffn, config, init, out_init, activation, bias)
        self.router = (Router if config.gating == "default" else DeepSpeedRouter).of(spec.router, topology)
        self.path: Any = (
            None  # None: the experts are all here, and take tokens; otherwise these take what it hands them
        )
        self.experts: Experts
        self.capacity, self.agreement = config.dispatch == "capacity", topology.slots
        if self.capacity:
            self.path, slots = token_path(config.num_experts, topology)
            self.experts = SlotExperts.of(spec.experts, topology, region=slots)
        elif topology.degrees.tensor == topology.degrees.expert == 1:
            self.experts = LocalExperts.of(spec.experts, topology, kernel=config.kernel)
        else:
            widths = hidden, ffn // topology.degrees.tensor
            self.path, rows = ragged_path(config.num_experts, widths, topology)
            self.experts = RowExperts.of(spec.experts, topology, region=rows)

    @property
    def moved(self) -> Rows | None:
        """Rows that a dropless layer has moved in training so far; None for one with capacity."""
        dropless = self.experts if self.path is None else self.path
        return dropless.moved if isinstance(dropless, LocalExperts | RaggedPath) else None

    def expect(self, x: Tensor) -> None:
        """Sees to it that the layer's collectives will fit those of other processes, before a forward pass.

        What :meth:`forward` does itself, unless it is compiled. Fake tensors, of simulations, meet nobody.

        Raises:
            ValueError: if the processes of an expert group have unequal numbers of tokens, and experts a capacity.
        """
        if self.capacity and not isinstance(x, FakeTensor):
            tokens = x.shape[0] * x.shape[1]
            self.agreement.expect(self, tokens, self.router.capacity(tokens))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, RouterReport]:
        """Activations (B, S, H) → (B, S, H), and what the router did; S as on this tensor rank.

        Args:
            x: activations.
            padding_mask: (B, S) bool, True where there is no token but padding (as torch's ``key_padding_mask``). It
                takes no slot, counts in no loss and no statistics, and its result is 0. None: there is none.

        Raises:
            ValueError: for a mask of another shape or type, and with DeepSpeed's gatings, which know no padding.
        """
        padding_T = None
        if padding_mask is not None:
            if padding_mask.dtype is not torch.bool or padding_mask.shape != x.shape[:2]:
                raise ValueError(
                    f"padding_mask is {padding_mask.dtype} {tuple(padding_mask.shape)}; it must be torch.bool "
                    f"{tuple(x.shape[:2])}, True where there is padding"
                )
            padding_T = padding_mask.flatten()
        if not torch.compiler.is_compiling():
            self.expect(x)
        x_TH = x.flatten(0, 1)
        routing = self.router(x_TH, x.shape[1], padding_T)
        if self.path is None:
            y_TH = self.experts(x_TH, routing)
        else:
            y_TH = self.path.combine(self.experts(self.path.dispatch(x_TH, routing)), routing)
        return y_TH.view_as(x), routing.report
