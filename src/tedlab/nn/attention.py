"""Causal self-attention whose heads are divided over the tensor group."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tedlab.config import ModelConfig, Positions, QKNorm
from tedlab.degrees import ParallelDegrees, check_divides
from tedlab.nn.linear import ColumnParallelLinear, ColumnParallelSpec, RowParallelLinear, RowParallelSpec
from tedlab.nn.norm import NormSpec, RMSNorm
from tedlab.nn.rotary import rotate
from tedlab.spec import Init, MicroBatch, ParameterSpec, Spec, Work, WorkingSet
from tedlab.topology import Topology


@dataclass(frozen=True)
class HeadNormSpec(NormSpec):
    """Describes an RMSNorm of each of so many heads, which all have the same weights."""

    heads: int = 1

    def own(self) -> Iterator[ParameterSpec]:
        for parameter in super().own():
            yield replace(parameter, own_tokens=False, own_features=True)

    def given(self, b: MicroBatch) -> tuple[int, torch.dtype]:
        return b.tokens * self.heads * self.hidden // b.tensor, b.compute


@dataclass(frozen=True)
class SelfAttentionSpec(Spec):
    """Describes a :class:`SelfAttention`.

    Attributes:
        hidden: Model width.
        heads: Number of heads of queries, a multiple of ``kv_heads``.
        init, out_init: Initial weights of the fused query-key-value projection and of the output projection.
        bias: Whether the projection to queries, keys and values has biases.
        rotary: Whether queries and keys are rotated by position.
        kv_heads: Number of heads of keys and values, a multiple of the tensor degree; None: as many as of queries.
        width: Features of a head; None: ``hidden / heads``.
        qk_norm: What the norms of queries and keys add to the mean square; None: there are none.
        out_bias: Whether the output projection has a bias; None: as the others.
    """

    parts = ("qkv", "q_norm", "k_norm", "out")
    hidden: int
    heads: int
    init: Init
    out_init: Init
    bias: bool = True
    rotary: bool = False
    kv_heads: int | None = None
    width: int | None = None
    qk_norm: float | None = None
    out_bias: bool | None = None

    @classmethod
    def of(cls, model: ModelConfig, init: Init, out_init: Init) -> "SelfAttentionSpec":
        """Describes the attention of a model's blocks."""
        rotary, qk_norm = model.positions == Positions.ROTARY, None if model.qk_norm == QKNorm.NONE else model.norm_eps
        sizes = model.kv_heads, model.head_dim
        bias, out = (model.bias if own is None else own for own in (model.attention.qkv_bias, model.attention.out_bias))
        return cls(model.hidden, model.heads, init, out_init, bias, rotary, *sizes, qk_norm, out)

    @property
    def head_dim(self) -> int:
        """The number of features of a head."""
        return self.width or self.hidden // self.heads

    @property
    def key_heads(self) -> int:
        """The number of heads of keys, and of values."""
        return self.kv_heads or self.heads

    def check(self, degrees: ParallelDegrees) -> None:
        if self.width is None and self.hidden % self.heads:
            raise ValueError(f"model.hidden ({self.hidden}) is not a multiple of model.heads ({self.heads})")
        if self.rotary and self.head_dim % 2:
            given = "model.head_dim" if self.width else "model.hidden / model.heads"
            sizes = f"{self.width}" if self.width else f"{self.hidden} / {self.heads}"
            raise ValueError(
                f"model.positions=rotary turns pairs of features, but {given} = {sizes} is odd; choose heads of even "
                "width, or model.positions=learned"
            )
        check_divides("model.heads", self.heads, "model.kv_heads", self.key_heads)
        check_divides("model.heads", self.heads, "parallel.tensor", degrees.tensor)
        check_divides("model.kv_heads", self.key_heads, "parallel.tensor", degrees.tensor)

    @property
    def qkv(self) -> ColumnParallelSpec:
        features = (self.heads + 2 * self.key_heads) * self.head_dim
        return ColumnParallelSpec(self.hidden, features, "attention", self.init, self.bias)

    @property
    def q_norm(self) -> HeadNormSpec | None:
        return None if self.qk_norm is None else HeadNormSpec(self.head_dim, "rms", self.qk_norm, self.heads)

    @property
    def k_norm(self) -> HeadNormSpec | None:
        return None if self.qk_norm is None else HeadNormSpec(self.head_dim, "rms", self.qk_norm, self.key_heads)

    @property
    def out(self) -> RowParallelSpec:
        bias = self.bias if self.out_bias is None else self.out_bias
        return RowParallelSpec(self.heads * self.head_dim, self.hidden, "attention", self.out_init, bias)

    def flops(self, length: int) -> Counter[str]:
        """Counts only half of the scores and weighted sums, since a token attends only to tokens up to itself."""
        projections = super().flops(length).total()
        return Counter(attention_projections=projections, attention_scores=2 * length * self.heads * self.head_dim)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        yield from self.qkv.forward(b)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                yield from norm.forward(b)
        if self.rotary:
            yield from self._rotate(b)
        if self._gathered(b):
            yield b.moved(2 * self._features(b, self.heads))
        yield self._scores(b, flops=4, sides=2)
        yield from self.out.forward(b, dead)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        yield from self.out.backward(b)
        yield self._scores(b, flops=10, sides=4)
        if self.rotary:
            yield from self._rotate_backward(b)
        for norm in (self.k_norm, self.q_norm):
            if norm is not None:
                yield from norm.backward(b)
        yield b.moved(2 * self._features(b, self.heads + 2 * self.key_heads))  # concatenates gradients of q, k and v
        yield from self.qkv.backward(b)

    def saved(self, b: MicroBatch) -> int:
        """Adds queries, keys and values, and one fp32 number for each row of scores."""
        copied = self.heads if self._gathered(b) else 0
        own = self._features(b, copied + self.heads + 2 * self.key_heads) * b.compute.itemsize
        return super().saved(b) + own + b.tokens * self.heads // b.tensor * 4

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        gradients = 2 * self._features(b, self.heads + 2 * self.key_heads)
        yield WorkingSet("attention", temporaries=gradients * b.compute.itemsize)

    def _gathered(self, b: MicroBatch) -> bool:
        """Tells whether the projection's queries are copied to one place: norms and rotations do so by themselves."""
        apart = self.heads > self.key_heads > b.tensor  # keys and values are between them
        return apart and not self.rotary and self.qk_norm is None

    def _features(self, b: MicroBatch, heads: int) -> int:
        """Returns the number of elements of this rank's part of so many heads."""
        return b.tokens * heads * self.head_dim // b.tensor

    def _rotate(self, b: MicroBatch) -> Iterator[Work]:
        """Yields the kernels that rotate queries and keys, half of the features at a time, and copy values."""
        for heads in (self.heads, self.key_heads):
            half = self._features(b, heads) // 2
            for _ in range(4):
                yield b.moved(half, b.compute, b.precise)
            for passes in (3, 3, 4):  # difference, sum, both together
                yield b.moved(passes * half, b.precise)
            if b.precise != b.compute:
                yield b.moved(2 * half, b.precise, b.compute)
        if self.qk_norm is None:
            yield b.moved(2 * self._features(b, self.key_heads))

    def _rotate_backward(self, b: MicroBatch) -> Iterator[Work]:
        for heads in (self.heads, self.key_heads):
            half = self._features(b, heads) // 2
            for _ in range(5):  # of the difference, and of four products
                yield b.moved(2 * half, b.precise)
            for _ in range(5 if b.precise != b.compute else 0):
                yield b.moved(half, b.precise, b.compute)
            for passes in (3, 3, 4):  # sums of each half's gradients, both together
                yield b.moved(passes * half)

    def _scores(self, b: MicroBatch, flops: int, sides: int) -> Work:
        """Returns the kernel of this rank's heads: ``flops`` per feature and visible pair.

        It moves ``sides`` tensors like the queries and as many like the keys.
        """
        size = sides * self._features(b, self.heads + self.key_heads) * b.compute.itemsize
        return Work(flops * self._features(b, self.heads) * b.length / 2, size, b.compute, "attention")


HEADS = ("hidden", "heads", "kv_heads", "head_dim")  # fields of a model that the next function sets


def with_heads(model: ModelConfig, heads: int, width: int, tensor: int) -> ModelConfig:
    """Returns a copy of a model with other heads, a multiple of the tensor degree, of about this width each.

    Several share keys and values if they do so in ``model``. Their width is not that of the model if it is not there.
    """
    kv_heads = head_dim = None
    if model.kv_heads is not None:
        kv_heads = tensor if model.kv_heads < model.heads else heads
    if model.head_dim is not None:
        head_dim = 2 * width
    return replace(model, heads=heads, hidden=heads * width, kv_heads=kv_heads, head_dim=head_dim)


class SelfAttention(nn.Module):
    """Causal self-attention (Vaswani et al., 2017) whose heads may share keys and values (Ainslie et al., 2023).

    Each tensor rank computes heads / T of the heads. The rows of the fused projection are ordered by head of keys: all
    queries that belong to it, then its key and its value. Dividing the rows evenly divides them by heads in any layout.
    """

    def __init__(self, spec: SelfAttentionSpec, topology: Topology) -> None:
        super().__init__()
        self.head_dim, self.group = spec.head_dim, spec.heads // spec.key_heads
        self.qkv = ColumnParallelLinear(spec.qkv, topology)
        self.q_norm = None if spec.q_norm is None else RMSNorm(spec.q_norm, topology)
        self.k_norm = None if spec.k_norm is None else RMSNorm(spec.k_norm, topology)
        self.out = RowParallelLinear(spec.out, topology)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Maps (B, S, H) to (B, S, H).

        Args:
            x: Activations outside, see ``region.py``.
            rotation: (2, S, head_dim/2), see :func:`tedlab.nn.rotation`; None: queries and keys are not rotated.
        """
        heads = self.qkv(x).unflatten(-1, (-1, self.group + 2, self.head_dim))
        q, k, v = heads.split((self.group, 1, 1), -2)  # (B, S, kv_heads/T, group or 1, head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = (rotate(part, rotation[:, :, None, None]) for part in (q, k))
            if self.q_norm is None:
                v = v.clone()  # a view would keep the whole projection alive, which otherwise the norms do
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))  # (B, heads/T, S, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.group > 1)
        return self.out(y.transpose(1, 2).flatten(-2))
