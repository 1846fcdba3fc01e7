"""A pre-norm transformer block: attention, then a dense feed-forward layer or a mixture of experts."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from tedlab.comm.rows import Rows
from tedlab.config import ModelConfig, MoEConfig
from tedlab.moe import MoELayer, MoESpec, RouterReport
from tedlab.nn import (
    FeedForward,
    FeedForwardSpec,
    LatentAttention,
    LatentAttentionSpec,
    NormSpec,
    SelfAttention,
    SelfAttentionSpec,
    norm_layer,
)
from tedlab.spec import Init, Layout, MicroBatch, Spec, Work, WorkingSet
from tedlab.topology import Topology


@dataclass(frozen=True)
class BlockSpec(Spec):
    """Describes a :class:`Block`."""

    parts = ("norm1", "attention", "norm2", "feed_forward")
    model: ModelConfig
    moe: MoEConfig | None  # None: the block has no experts
    window: int | None = None  # tokens that a token attends to; None: all before it

    @property
    def norm1(self) -> NormSpec:
        return NormSpec(self.model.hidden, self.model.norm, self.model.norm_eps)

    norm2 = norm1

    @property
    def inits(self) -> tuple[Init, Init]:
        """Initial weights of projections into a layer and out of it; the latter are scaled as in GPT-2."""
        return Init(std=self.model.init_std), Init(std=self.model.init_std / math.sqrt(2 * self.model.layers))

    @property
    def attention(self) -> SelfAttentionSpec | LatentAttentionSpec:
        if self.model.attention.latent.kv_rank is not None:
            return LatentAttentionSpec.of(self.model, *self.inits)
        return SelfAttentionSpec.of(self.model, *self.inits, self.window)

    @property
    def feed_forward(self) -> FeedForwardSpec | MoESpec:
        model = self.model
        layer = FeedForwardSpec(model.hidden, model.ffn, *self.inits, model.activation, model.bias, model.swiglu_limit)
        return layer if self.moe is None else MoESpec(replace(layer, ffn=self.moe.ffn or model.ffn), self.moe)

    def rows(self, layout: Layout, tokens: int) -> Rows:
        """Returns the rows that it moves between its experts and other processes, see :meth:`DispatchSpec.rows`."""
        inner = self.feed_forward
        return inner.dispatch.rows(inner.inside(layout), tokens) if isinstance(inner, MoESpec) else Rows()

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        yield from self.norm1.forward(b)
        yield from self.attention.forward(b, dead)
        yield from self.norm2.forward_of_sum(b)
        yield from self.feed_forward.forward(b, dead, stop)
        if not stop:
            yield b.moved(b.outside * self.model.hidden, b.parameter, b.parameter, b.compute)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        for layer, norm in ((self.feed_forward, self.norm2), (self.attention, self.norm1)):
            yield from layer.backward(b)
            yield from norm.backward_beside(b)

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        yield from self.feed_forward.working_sets(b, recomputed)
        freed = self.norm2.saved(b) + self.feed_forward.saved(b)
        for moment in self.attention.working_sets(b, recomputed):
            yield moment._replace(done=self.gradients(b), freed=freed)


class Block(nn.Module):
    """Pre-norm transformer block whose ``feed_forward`` is dense or a mixture of experts."""

    def __init__(self, spec: BlockSpec, topology: Topology) -> None:
        super().__init__()
        self.norm1 = norm_layer(spec.norm1, topology)
        kind = spec.attention
        self.attention = (
            LatentAttention(kind, topology) if isinstance(kind, LatentAttentionSpec) else SelfAttention(kind, topology)
        )
        self.norm2 = norm_layer(spec.norm2, topology)
        inner = spec.feed_forward
        self.routed = spec.moe is not None
        self.feed_forward = MoELayer(inner, topology) if isinstance(inner, MoESpec) else FeedForward(inner, topology)

    def forward(
        self, x: Tensor, rotation: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, RouterReport | None]:
        """Maps activations (B, S, H) to (B, S, H), and returns the router's report if the block has experts.

        Args:
            x: Activations.
            rotation: Turns queries and keys, see :class:`tedlab.nn.SelfAttention`.
            padding_mask: See :class:`tedlab.moe.MoELayer`.
        """
        x = x + self.attention(self.norm1(x), rotation)
        if not self.routed:
            return x + self.feed_forward(self.norm2(x)), None
        y, report = self.feed_forward(self.norm2(x), padding_mask)
        return x + y, report
