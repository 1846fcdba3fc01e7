"""The MoE layer: a router, and the mixture of what it chooses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tedlab.config import MoEConfig
from tedlab.moe.dispatch import DispatchSpec
from tedlab.moe.experts import Experts, ExpertsSpec, mixtures
from tedlab.moe.router import RouterReport, RouterSpec, routers
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
        return routers[self.config.gating].spec(self.hidden, self.config, self.init)

    @property
    def dispatch(self) -> DispatchSpec:
        return mixtures[self.config.dispatch].dispatch(self.hidden, self.config)

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
        self.router = routers[config.gating].of(spec.router, topology)
        self.experts: Experts = mixtures[config.dispatch].make(spec.experts, config, topology)

    def expect(self, x: Tensor) -> None:
        """Sees to it that the layer's collectives will fit those of other processes, before a forward pass.

        What :meth:`forward` does itself, unless it is compiled.

        Raises:
            ValueError: if the processes of an expert group have unequal numbers of tokens, and experts a capacity.
        """
        tokens = x.shape[0] * x.shape[1]
        self.experts.expect(tokens, self.router.capacity(tokens))

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
        return self.experts(x_TH, routing).view_as(x), routing.report
