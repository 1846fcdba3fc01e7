"""The paper's model: a GPT-3-style decoder with experts in every second feed-forward layer (paper §2)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tedlab.comm import checkpoint
from tedlab.comm.rows import Rows
from tedlab.comm.sites import block_sites, kept_tags, plan
from tedlab.config import ModelConfig, MoEConfig
from tedlab.moe import Experts, MoELayer, RouterReport
from tedlab.nn import (
    ColumnParallelLinear,
    Embedding,
    FeedForward,
    Init,
    LayerNorm,
    SelfAttention,
    VocabParallelEmbedding,
    initialize,
    localised,
)
from tedlab.topology import Topology


class Block(nn.Module):
    """Pre-norm transformer block; ``feed_forward`` is dense or a mixture of experts."""

    def __init__(self, index: int, model: ModelConfig, moe: MoEConfig, topology: Topology, early_stop: bool) -> None:
        super().__init__()
        self.topology, self.recomputed, self.early_stop = topology, model.checkpoint == "block", early_stop
        self.compiled = (
            None if model.compile == "none" else torch.compile(self._recomputed, backend=model.compile, fullgraph=True)
        )
        init = Init(std=model.init_std)
        out_init = Init(std=model.init_std / math.sqrt(2 * model.layers))  # GPT-2's scaling of residual outputs
        self.norm1 = LayerNorm(model.hidden, topology)
        self.attention = SelfAttention(model.hidden, model.heads, topology, init=init, out_init=out_init)
        self.norm2 = LayerNorm(model.hidden, topology)
        self.routed = index in moe.blocks(model.layers)
        self.feed_forward: nn.Module
        if self.routed:
            self.feed_forward = MoELayer(model.hidden, model.ffn, moe, topology, init=init, out_init=out_init)
        else:
            self.feed_forward = FeedForward(model.hidden, model.ffn, topology, init=init, out_init=out_init)
        options, comm = topology.options, topology.comm
        sites = block_sites(self.routed, options, topology.sequence_sharded, comm.sizes)
        self.plan = plan(sites, kept_tags(options.cac, index))

    def forward(self, x: Tensor) -> tuple[Tensor, RouterReport | None]:
        """Activations (B, S, H) → (B, S, H), and the router's report if there are experts here."""
        if self.compiled is not None:
            with localised(self):
                return self.compiled(x)
        return self._recomputed(x)

    def _recomputed(self, x: Tensor) -> tuple[Tensor, RouterReport | None]:
        if not (self.recomputed and torch.is_grad_enabled()):
            return self._forward(x)
        return checkpoint(
            self._forward,
            x,
            counters=self.topology.recomputation,
            plan=self.plan,
            skip_dead_gemm=self.topology.options.skip_dead_gemm,
            early_stop=self.early_stop,
        )

    def _forward(self, x: Tensor) -> tuple[Tensor, RouterReport | None]:
        x = x + self.attention(self.norm1(x))
        if self.routed:
            y, report = self.feed_forward(self.norm2(x))
            return x + y, report
        return x + self.feed_forward(self.norm2(x)), None


class GPT(nn.Module):
    """Decoder-only language model, built as this process's shard, with initial weights.

    Args:
        model: architecture; ``vocab_size`` must be set.
        moe: experts; ``num_experts = 0`` makes a dense model.
        topology: where this process stands.
        seed: of the initial weights, which depend on nothing else.
        early_stop: of recomputation, see :func:`tedlab.comm.checkpoint`.
    """

    def __init__(
        self, model: ModelConfig, moe: MoEConfig, topology: Topology, seed: int, early_stop: bool = True
    ) -> None:
        super().__init__()
        assert model.vocab_size is not None
        init = Init(std=model.init_std)
        self.embedding = VocabParallelEmbedding(model.vocab_size, model.hidden, topology, init=init)
        self.positions = Embedding(model.sequence_length, model.hidden, topology, init=init)
        self.blocks = nn.ModuleList(Block(i, model, moe, topology, early_stop) for i in range(model.layers))
        self.norm = LayerNorm(model.hidden, topology)
        self.output = (
            None
            if model.tie_embeddings
            else ColumnParallelLinear(model.hidden, model.vocab_size, topology, tag="output", init=init, bias=False)
        )
        initialize(self, seed)

    @property
    def moved(self) -> dict[int, Rows]:
        """Rows that dropless layers have moved in training so far, by block; empty if there are none."""
        layers = {index: block.feed_forward for index, block in enumerate(self.blocks)}
        return {
            index: layer.moved
            for index, layer in layers.items()
            if isinstance(layer, MoELayer) and layer.moved is not None
        }

    def forward(self, ids: Tensor) -> tuple[Tensor, list[RouterReport]]:
        """Token ids (B, S) int64 → this tensor rank's logits (B, S, V/T), and one report per MoE layer."""
        x = self.embedding(ids) + self.positions(ids.shape[1])  # (B, S, H)
        reports = []
        for block in self.blocks:
            x, report = block(x)
            if report is not None:
                reports.append(report)
        x = self.norm(x)
        return self.embedding.logits(x) if self.output is None else self.output(x), reports


class ParameterCount(NamedTuple):
    """Parameters of the whole model, over all processes.

    Attributes:
        total: all of them.
        active: those that one token meets: of each MoE layer's experts only top_k.
    """

    total: int
    active: int


def count_parameters(module: nn.Module, top_k: int) -> ParameterCount:
    """Counts parameters globally (sharded ones by their global shape)."""
    total = sum(p.numel() for p in module.parameters())
    idle: int = 0
    for experts in module.modules():
        if isinstance(experts, Experts):
            count = experts.num_experts
            idle += sum(p.numel() for p in experts.parameters()) * (count - top_k) // count
    return ParameterCount(total, total - idle)
