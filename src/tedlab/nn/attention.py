"""Causal self-attention with its heads divided over the tensor group."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tedlab.nn.linear import ColumnParallelLinear, ColumnParallelSpec, RowParallelLinear, RowParallelSpec
from tedlab.nn.rotary import rotate
from tedlab.nn.sharded import Layer
from tedlab.spec import Init, MicroBatch, Spec, Work, WorkingSet
from tedlab.topology import Topology


@dataclass(frozen=True)
class SelfAttentionSpec(Spec):
    """Of :class:`SelfAttention`."""

    parts = ("qkv", "out")
    hidden: int
    heads: int
    init: Init
    out_init: Init
    bias: bool = True

    @property
    def qkv(self) -> ColumnParallelSpec:
        return ColumnParallelSpec(self.hidden, 3 * self.hidden, "attention", self.init, self.bias)

    @property
    def out(self) -> RowParallelSpec:
        return RowParallelSpec(self.hidden, self.hidden, "attention", self.out_init, self.bias)

    def flops(self, length: int) -> Counter[str]:
        """Of scores and weighted sums half: a token looks at the tokens before it only."""
        projections = super().flops(length).total()
        return Counter(attention_projections=projections, attention_scores=2 * length * self.hidden)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        yield from self.qkv.forward(b)
        yield self._scores(b, flops=4, moved=4)
        yield from self.out.forward(b, dead)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        yield from self.out.backward(b)
        yield self._scores(b, flops=10, moved=8)
        yield b.moved(6 * b.tokens * self.hidden // b.tensor)  # of q, k and v, put together
        yield from self.qkv.backward(b)

    def saved(self, b: MicroBatch) -> int:
        """Also queries, keys and values, and a number for each row of scores."""
        own = 3 * b.tokens * self.hidden // b.tensor * b.compute.itemsize + b.tokens * self.heads // b.tensor * 4
        return super().saved(b) + own

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        yield WorkingSet("attention", temporaries=6 * b.tokens * self.hidden // b.tensor * b.compute.itemsize)

    def _scores(self, b: MicroBatch, flops: int, moved: int) -> Work:
        """Of this tensor rank's heads: FLOPs for each pair of positions and feature, tensors like the queries."""
        elements = b.tokens * self.hidden // b.tensor
        size = moved * elements * b.compute.itemsize
        return Work(flops * elements * b.length / 2, size, b.compute, "attention")


class SelfAttention(Layer):
    """Multi-head causal self-attention (Vaswani et al., 2017), each tensor rank computing heads / T of the heads.

    The rows of the fused projection are ordered head by head (q, k, v of head 0, then of head 1, …), so that an even
    division of the rows is a division by heads in every layout.

    Args:
        hidden: model width, a multiple of ``heads``.
        heads: number of heads, a multiple of the tensor degree.
        topology: where this process stands.
        init: initial weights of the fused query-key-value projection.
        out_init: initial weights of the output projection.
        bias: whether the projections have biases.
    """

    def __init__(
        self, hidden: int, heads: int, topology: Topology, *, init: Init, out_init: Init, bias: bool = True
    ) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        spec = SelfAttentionSpec(hidden, heads, init, out_init, bias)
        self.qkv = ColumnParallelLinear.of(spec.qkv, topology)
        self.out = RowParallelLinear.of(spec.out, topology)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """(B, S, H) → (B, S, H).

        Args:
            x: activations.
            rotation: (2, S, head_dim/2) of queries and keys, see :func:`tedlab.nn.rotation`; None: they stay.
        """
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3, self.head_dim)).unbind(-2)  # each (B, S, heads/T, head_dim)
        if rotation is not None:
            q, k = (rotate(part, rotation.unsqueeze(-2)) for part in (q, k))
            v = v.clone()  # else all of the projection would be kept for it
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, heads/T, S, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))
