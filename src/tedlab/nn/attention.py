"""Causal self-attention whose heads are divided over the tensor group."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from tedlab.config import ModelConfig, Positions
from tedlab.degrees import ParallelDegrees, check_divides
from tedlab.nn.linear import ColumnParallelLinear, ColumnParallelSpec, RowParallelLinear, RowParallelSpec
from tedlab.nn.rotary import rotate
from tedlab.spec import Init, MicroBatch, Spec, Work, WorkingSet
from tedlab.topology import Topology


@dataclass(frozen=True)
class SelfAttentionSpec(Spec):
    """Describes a :class:`SelfAttention`.

    Attributes:
        hidden: Model width, a multiple of ``heads``.
        heads: Number of heads, a multiple of the tensor degree.
        init, out_init: Initial weights of the fused query-key-value projection and of the output projection.
        bias: Whether the projections have biases.
        rotary: Whether queries and keys are rotated by position.
    """

    parts = ("qkv", "out")
    hidden: int
    heads: int
    init: Init
    out_init: Init
    bias: bool = True
    rotary: bool = False

    @classmethod
    def of(cls, model: ModelConfig, init: Init, out_init: Init) -> "SelfAttentionSpec":
        """Describes the attention of a model's blocks."""
        return cls(model.hidden, model.heads, init, out_init, model.bias, model.positions == Positions.ROTARY)

    @property
    def head_dim(self) -> int:
        """The number of features of a head."""
        return self.hidden // self.heads

    def check(self, degrees: ParallelDegrees) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"model.hidden ({self.hidden}) is not a multiple of model.heads ({self.heads})")
        if self.rotary and self.head_dim % 2:
            raise ValueError(
                f"model.positions=rotary turns pairs of features, but model.hidden / model.heads = {self.hidden} / "
                f"{self.heads} is odd; choose heads of even width, or model.positions=learned"
            )
        check_divides("model.heads", self.heads, "parallel.tensor", degrees.tensor)

    @property
    def qkv(self) -> ColumnParallelSpec:
        return ColumnParallelSpec(self.hidden, 3 * self.hidden, "attention", self.init, self.bias)

    @property
    def out(self) -> RowParallelSpec:
        return RowParallelSpec(self.hidden, self.hidden, "attention", self.out_init, self.bias)

    def flops(self, length: int) -> Counter[str]:
        """Counts only half of the scores and weighted sums, since a token attends only to tokens up to itself."""
        projections = super().flops(length).total()
        return Counter(attention_projections=projections, attention_scores=2 * length * self.hidden)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        yield from self.qkv.forward(b)
        if self.rotary:
            yield from self._rotate(b)
        yield self._scores(b, flops=4, moved=4)
        yield from self.out.forward(b, dead)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        yield from self.out.backward(b)
        yield self._scores(b, flops=10, moved=8)
        if self.rotary:
            yield from self._rotate_backward(b)
        yield b.moved(6 * b.tokens * self.hidden // b.tensor)  # concatenates the gradients of q, k and v
        yield from self.qkv.backward(b)

    def saved(self, b: MicroBatch) -> int:
        """Adds queries, keys and values, and one fp32 number for each row of scores."""
        own = 3 * b.tokens * self.hidden // b.tensor * b.compute.itemsize + b.tokens * self.heads // b.tensor * 4
        return super().saved(b) + own

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        yield WorkingSet("attention", temporaries=6 * b.tokens * self.hidden // b.tensor * b.compute.itemsize)

    def _rotate(self, b: MicroBatch) -> Iterator[Work]:
        """Yields the kernels that rotate queries and keys, half of the features at a time, and copy values."""
        half = b.tokens * self.hidden // b.tensor // 2
        for _ in ("queries", "keys"):
            for _ in range(4):
                yield b.moved(half, b.compute, b.precise)
            for passes in (3, 3, 4):  # difference, sum, both together
                yield b.moved(passes * half, b.precise)
            if b.precise != b.compute:
                yield b.moved(2 * half, b.precise, b.compute)
        yield b.moved(4 * half)

    def _rotate_backward(self, b: MicroBatch) -> Iterator[Work]:
        half = b.tokens * self.hidden // b.tensor // 2
        for _ in ("queries", "keys"):
            yield b.moved(2 * half, b.precise)  # of the difference
            for _ in range(4):
                yield b.moved(2 * half, b.precise)
            for _ in range(5 if b.precise != b.compute else 0):
                yield b.moved(half, b.precise, b.compute)
            for passes in (3, 3, 4):  # sums of each half's gradients, both together
                yield b.moved(passes * half)

    def _scores(self, b: MicroBatch, flops: int, moved: int) -> Work:
        """Returns the kernel of this rank's heads: ``flops`` per feature and visible pair, ``moved`` tensors like q."""
        elements = b.tokens * self.hidden // b.tensor
        size = moved * elements * b.compute.itemsize
        return Work(flops * elements * b.length / 2, size, b.compute, "attention")


HEADS = ("hidden", "heads")  # fields of a model that the next function sets


def with_heads(model: ModelConfig, heads: int, width: int, tensor: int) -> ModelConfig:
    """Returns a copy of a model with other heads, a multiple of the tensor degree, of about this width each."""
    return replace(model, heads=heads, hidden=heads * width)


class SelfAttention(nn.Module):
    """Multi-head causal self-attention (Vaswani et al., 2017); each tensor rank computes heads / T of the heads.

    The rows of the fused projection are ordered by head (q, k, v of head 0, then of head 1, …), so that dividing the
    rows evenly divides them by heads in every layout.
    """

    def __init__(self, spec: SelfAttentionSpec, topology: Topology) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.qkv = ColumnParallelLinear(spec.qkv, topology)
        self.out = RowParallelLinear(spec.out, topology)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Maps (B, S, H) to (B, S, H).

        Args:
            x: Activations outside, see ``region.py``.
            rotation: (2, S, head_dim/2), see :func:`tedlab.nn.rotation`; None: queries and keys are not rotated.
        """
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3, self.head_dim)).unbind(-2)  # each (B, S, heads/T, head_dim)
        if rotation is not None:
            q, k = (rotate(part, rotation.unsqueeze(-2)) for part in (q, k))
            v = v.clone()  # a view would keep the whole projection alive
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, heads/T, S, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))
