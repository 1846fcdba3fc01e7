"""Causal self-attention whose heads are divided over the tensor group."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tedlab.comm import evaluating
from tedlab.config import ModelConfig, Positions, QKNorm
from tedlab.degrees import ParallelDegrees, check_divides
from tedlab.nn.attend import AttentionPath, attend, attention_path, new_pairs, visible_pairs
from tedlab.nn.linear import ColumnParallelLinear, ColumnParallelSpec, RowParallelLinear, RowParallelSpec
from tedlab.nn.norm import (
    FullNormSpec,
    NormSpec,
    RMSNorm,
    backward_before_rotation,
    normalise_together,
    normalise_together_sites,
)
from tedlab.nn.past import Past
from tedlab.nn.rotary import rotate, rotate_backward, rotate_forward
from tedlab.nn.sharded import ShardedModule
from tedlab.spec import Init, Kernel, Layout, MicroBatch, ParameterSpec, Sites, Spec, Work, WorkingSet
from tedlab.topology import Topology


@dataclass(frozen=True)
class HeadNormSpec(NormSpec):
    """Describes an RMSNorm of each of so many heads, which all have the same weights."""

    heads: int = 1

    def own(self) -> Iterator[ParameterSpec]:
        for parameter in super().own():
            yield replace(parameter, own_tokens=False, own_part=True)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        if b.compiled:
            elements, dtype = self.given(b)
            yield b.moved(elements, dtype)
            return
        yield from super().forward(b)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        if b.compiled:
            yield from backward_before_rotation(b, *self.given(b))
            return
        yield from super().backward(b)

    def given(self, b: MicroBatch) -> tuple[int, torch.dtype]:
        return b.tokens * max(1, self.heads // b.tensor) * self.hidden, b.compute


@dataclass(frozen=True)
class KeyValueSpec(ColumnParallelSpec):
    """Describes the projection to so many heads of keys and of values, beside another whose input it takes.

    A head stays whole: where there are more tensor ranks than heads, each computes the one that its queries need.
    """

    heads: int = 1

    def own(self) -> Iterator[ParameterSpec]:
        for parameter in super().own():
            yield replace(parameter, units=self.heads)

    def sites(self, layout: Layout) -> Sites:
        return Sites()  # its input has entered the region already

    def widths(self, b: MicroBatch) -> tuple[int, int]:
        return self.in_features, self.out_features // min(self.heads, b.tensor)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        k, n = self.widths(b)
        if b.mixed:
            yield b.moved(k * n, b.parameter, b.compute)
        yield b.product(b.tokens, k, n)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        k, n = self.widths(b)
        yield from b.product_backward(b.tokens, k, n)
        if self.bias:
            yield b.moved(b.tokens * n)
        if self.heads < b.tensor:
            yield b.moved(self.out_features * k + k * n, b.parameter)  # zeros for the other heads
        # Adds the gradients of the input; a compiled norm's backward pass reads both unless they are reduced first.
        yield b.moved((1 if b.compiled and b.tensor == 1 else 3) * b.tokens * k)

    def saved(self, b: MicroBatch) -> int:
        """Counts the weights if they are converted; the other projection keeps the input."""
        k, n = self.widths(b)
        return k * n * b.compute.itemsize if b.mixed else 0


@dataclass(frozen=True)
class SelfAttentionSpec(Spec):
    """Describes a :class:`SelfAttention`.

    Attributes:
        hidden: Model width.
        heads: Number of heads of queries, a multiple of ``kv_heads`` and of the tensor degree.
        init, out_init: Initial weights of the projections to queries, keys and values, and of the output projection.
        bias: Whether the projections to queries, keys and values have biases.
        rotary: Whether queries and keys are rotated by position.
        kv_heads: Number of heads of keys and values, a multiple or a divisor of the tensor degree; None: as many as of
            queries.
        width: Features of a head; None: ``hidden / heads``.
        qk_norm: What the norms of queries and keys add to the mean square; None: there are none.
        out_bias: Whether the output projection has a bias; None: as the others.
        together: Whether a norm is that of all heads' features together, instead of each head's.
        window: How many tokens a token attends to, itself and those before it; None: all.
        sinks: Whether each head's softmax has one more entry, a learned logit without a value.
    """

    parts = ("qkv", "q", "kv", "q_norm", "k_norm", "out")
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
    together: bool = False
    window: int | None = None
    sinks: bool = False

    @classmethod
    def of(cls, model: ModelConfig, init: Init, out_init: Init, window: int | None = None) -> "SelfAttentionSpec":
        """Describes the attention of a model's blocks that have this window."""
        rotary, qk_norm = model.positions == Positions.ROTARY, None if model.qk_norm == QKNorm.NONE else model.norm_eps
        sizes = model.kv_heads, model.head_dim
        bias, out = (model.bias if own is None else own for own in (model.attention.qkv_bias, model.attention.out_bias))
        together, sinks = model.qk_norm == QKNorm.FULL, model.attention.sinks
        shape = model.hidden, model.heads, init, out_init, bias, rotary, *sizes
        return cls(*shape, qk_norm, out, together=together, window=window, sinks=sinks)

    @property
    def head_dim(self) -> int:
        """The number of features of a head."""
        return self.width or self.hidden // self.heads

    @property
    def rotary_dim(self) -> int:
        """The number of features of a head that are rotated, if they are."""
        return self.head_dim

    @property
    def key_heads(self) -> int:
        """The number of heads of keys, and of values."""
        return self.kv_heads or self.heads

    @property
    def fused(self) -> bool:
        """Whether one projection makes queries, keys and values; heads that share keys have two in every layout."""
        return self.key_heads == self.heads

    def path(self, device: str, dtype: torch.dtype, length: int, documents: bool = False) -> AttentionPath:
        """Returns the way that attention over so many tokens is computed, see :func:`tedlab.nn.attention_path`."""
        window = self.window is not None and self.window < length
        return attention_path(device, dtype, (self.head_dim, self.head_dim), window, self.sinks, documents)

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
        if not _divide(self.key_heads, degrees.tensor):
            divisors = (n for n in range(1, self.heads + 1) if self.heads % n == 0)
            fitting = ", ".join(str(n) for n in divisors if _divide(self.key_heads, n))
            raise ValueError(
                f"model.kv_heads ({self.key_heads}) is neither a multiple nor a divisor of parallel.tensor "
                f"({degrees.tensor}). With these heads, parallel.tensor can be {fitting}"
            )

    def own(self) -> Iterator[ParameterSpec]:
        if self.sinks:
            yield ParameterSpec("sinks", (self.heads,), divided={"tensor": 0}, decayed=False)

    @property
    def qkv(self) -> ColumnParallelSpec | None:
        if not self.fused:
            return None
        features, parts = 3 * self.heads * self.head_dim, (self.head_dim,) * 3
        return ColumnParallelSpec(self.hidden, features, "attention", self.init, self.bias, alternating=parts)

    @property
    def q(self) -> ColumnParallelSpec | None:
        if self.fused:
            return None
        return ColumnParallelSpec(self.hidden, self.heads * self.head_dim, "attention", self.init, self.bias)

    @property
    def kv(self) -> KeyValueSpec | None:
        if self.fused:
            return None
        features = 2 * self.key_heads * self.head_dim
        parts = (self.head_dim,) * 2
        return KeyValueSpec(self.hidden, features, "attention", self.init, self.bias, self.key_heads, alternating=parts)

    @property
    def q_norm(self) -> HeadNormSpec | FullNormSpec | None:
        return self._norm(self.heads)

    @property
    def k_norm(self) -> HeadNormSpec | FullNormSpec | None:
        return self._norm(self.key_heads)

    def _norm(self, heads: int) -> HeadNormSpec | FullNormSpec | None:
        if self.qk_norm is None:
            return None
        if self.together:
            return FullNormSpec(heads * self.head_dim, "rms", self.qk_norm, heads)
        return HeadNormSpec(self.head_dim, "rms", self.qk_norm, heads)

    @property
    def out(self) -> RowParallelSpec:
        bias = self.bias if self.out_bias is None else self.out_bias
        return RowParallelSpec(self.heads * self.head_dim, self.hidden, "attention", self.out_init, bias)

    def sites(self, layout: Layout) -> Sites:
        entry = self.qkv or self.q
        assert entry is not None
        together = self.together and self.qk_norm is not None
        norms = normalise_together_sites(2, "attention.norm") if together else Sites()
        return entry.sites(layout).then(norms).then(self.out.sites(layout))

    def flops(self, length: int) -> Counter[str]:
        """Counts the scores and weighted sums of visible pairs only: a token attends to tokens up to itself."""
        projections = super().flops(length).total()
        scores = 4 * visible_pairs(length, self.window) * self.heads * self.head_dim / length
        return Counter(attention_projections=projections, attention_scores=round(scores))

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        for part in (self.qkv, self.q, self.kv, self.q_norm, self.k_norm):
            if part is not None:
                yield from part.forward(b)
        if self.together and self.fused and not b.compiled:
            # Lays the features of all heads side by side.
            yield b.moved(2 * (self._queries(b) + self._keys(b)), kernel="strided")
        for elements in (self._queries(b), self._keys(b)) if self.rotary or (self.q_norm and b.compiled) else ():
            yield from rotate_forward(b, elements)
        if self.together or (self.rotary and self.qk_norm is None):
            yield b.moved(2 * self._keys(b), kernel="strided")  # to copy values
        yield self._scores(b, "attention", flops=4, sides=2)
        yield from self.out.forward(b, dead)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        yield from self.out.backward(b)
        yield self._scores(b, "attention_backward", flops=10, sides=4)
        for elements in (self._queries(b), self._keys(b)) if self.rotary else ():
            if b.compiled and self.q_norm is not None:  # a norm's kernel reads what this one writes
                yield b.moved(elements, b.compute, b.precise)
            else:
                yield from rotate_backward(b, elements)
        for norm in (self.k_norm, self.q_norm):
            if norm is not None:
                yield from norm.backward(b)
        # Concatenates the gradients of what one projection made; compiled, kernels write to where these belong.
        made = 2 * self._keys(b) + (self._queries(b) if self.fused else 0)
        yield b.moved(2 * (self._keys(b) if self.rotary and b.compiled else made), kernel="strided")
        for part in (self.kv, self.q, self.qkv):
            if part is not None:
                yield from part.backward(b)

    def saved(self, b: MicroBatch) -> int:
        """Adds queries, keys and values, and one fp32 number for each row of scores."""
        own = (self._queries(b) + 2 * self._keys(b)) * b.compute.itemsize
        return super().saved(b) + own + b.tokens * self.heads // b.tensor * 4

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        gradients = 2 * (self._queries(b) + 2 * self._keys(b))
        yield WorkingSet("attention", temporaries=gradients * b.compute.itemsize)

    def remembered(self, tensor: int) -> int:
        """Returns the elements of a token that :class:`~tedlab.nn.Past` keeps in each of so many tensor ranks."""
        return 2 * max(1, self.key_heads // tensor) * self.head_dim

    def _queries(self, b: MicroBatch) -> int:
        """Returns the number of elements of this rank's queries."""
        return b.tokens * self.heads * self.head_dim // b.tensor

    def _keys(self, b: MicroBatch) -> int:
        """Returns the number of elements of the keys, or of the values, that this rank's queries need."""
        return b.tokens * max(1, self.key_heads // b.tensor) * self.head_dim

    def _scores(self, b: MicroBatch, name: str, flops: int, sides: int) -> Work:
        """Returns the kernel of this rank's heads: ``flops`` per feature and visible pair.

        It moves ``sides`` tensors like the queries and as many like the keys, and reads what is remembered.
        """
        seen = b.past if self.window is None else min(b.past, self.window)
        size = sides * (self._queries(b) + self._keys(b)) + b.tokens // b.length * seen * self.remembered(b.tensor)
        size *= b.compute.itemsize
        pairs = new_pairs(b.past, b.length, self.window) / b.length
        sdpa = not b.past and self.path("cpu", b.compute, b.length) == "sdpa"  # the device makes no difference here
        kernel = Kernel(name, b.length, self.head_dim) if sdpa else None
        return Work(flops * self._queries(b) * pairs, size, b.compute, "attention", kernel=kernel)


def _divide(heads: int, degree: int) -> bool:
    """Tells whether each rank can have whole heads to itself, or each head whole ranks."""
    return heads % degree == 0 or degree % heads == 0


HEADS = ("hidden", "heads", "kv_heads", "head_dim")  # fields of a model that the next function sets


def with_heads(model: ModelConfig, heads: int, width: int, tensor: int) -> ModelConfig:
    """Returns a copy of a model with other heads, a multiple of the tensor degree, of about this width each.

    Several share keys and values if they do so in ``model``, and tensor ranks share heads of these if they must there.
    Their width is not that of the model if it is not there.
    """
    kv_heads = head_dim = None
    if model.kv_heads is not None:
        fewer = model.kv_heads < tensor and tensor % model.kv_heads == 0
        kv_heads = model.kv_heads if fewer else tensor if model.kv_heads < model.heads else heads
    if model.head_dim is not None:
        head_dim = 2 * width
    return replace(model, heads=heads, hidden=heads * width, kv_heads=kv_heads, head_dim=head_dim)


class SelfAttention(ShardedModule):
    """Causal self-attention (Vaswani et al., 2017) whose heads may share keys and values (Ainslie et al., 2023).

    Each tensor rank computes heads / T of the heads. If each head has its own keys, one fused projection's rows are
    ordered by head: its query, its key and its value. Otherwise the rows of ``q`` are ordered by head, of which
    neighbours share keys, and those of ``kv`` by head of keys: its key and its value. Dividing the rows evenly divides
    them by heads in any layout; where there are fewer heads of keys than ranks, all ranks hold ``kv`` and each uses one
    head of it.
    """

    def __init__(self, spec: SelfAttentionSpec, topology: Topology) -> None:
        super().__init__()
        self.build(spec, topology)
        self.head_dim, self.comm, self.context = spec.head_dim, topology.comm, topology.context
        self.past: Past | None = None
        # Heads of keys, and of queries of each, in this process.
        self.own_heads = (
            max(1, spec.key_heads // topology.degrees.tensor),
            spec.heads // max(spec.key_heads, topology.degrees.tensor),
        )
        self.window, self.together = spec.window, spec.together and spec.qk_norm is not None
        self.qkv = None if spec.qkv is None else ColumnParallelLinear(spec.qkv, topology)
        self.q = None if spec.q is None else ColumnParallelLinear(spec.q, topology)
        self.kv = None if spec.kv is None else ColumnParallelLinear(spec.kv, topology)
        self.q_norm = None if spec.q_norm is None else RMSNorm(spec.q_norm, topology)
        self.k_norm = None if spec.k_norm is None else RMSNorm(spec.k_norm, topology)
        self.out = RowParallelLinear(spec.out, topology)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Maps (B, S, H) to (B, S, H).

        Args:
            x: Activations outside, see ``region.py``.
            rotation: (2, S, head_dim/2), see :func:`tedlab.nn.rotation`, or (2, B, S, head_dim/2) if samples' positions
                differ; None: queries and keys are not rotated.
        """
        q, k, v = self._projected(x)  # (B, S, heads of keys, queries of each or 1, head_dim)
        q, k = self._normed(q, k)
        if rotation is not None:
            turns = rotation.unsqueeze(-2).unsqueeze(-2)
            q, k = (rotate(part, turns) for part in (q, k))
        if not evaluating() and (self.together or (rotation is not None and self.q_norm is None)):
            v = v.clone()  # a view would keep the whole projection alive, which otherwise the norms of heads do
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))  # (B, heads/T, S, head_dim)
        sinks = self.local("sinks") if "sinks" in self.specs else None
        if self.past is not None:
            return self._output(self._with_past(q, k, v, sinks, self.past))
        return self._output(attend(q, k, v, self.window, sinks, documents=self.context.documents))

    def _with_past(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, past: Past) -> Tensor:
        """Attends to what is remembered, too; of the first tokens nothing is."""
        all_k, all_v = (part.transpose(1, 2) for part in past.extend(id(self), k.transpose(1, 2), v.transpose(1, 2)))
        if past.begins:
            return attend(q, k, v, self.window, sinks)
        return past.attend(q, all_k, all_v, self.window, sinks)

    def _output(self, y: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(-2))

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        if not self.together:
            return self.q_norm(q), self.k_norm(k)
        flat = [part.flatten(2).contiguous() for part in (q, k)]
        flat = normalise_together((self.q_norm, self.k_norm), flat, self.comm, "attention.norm")
        return flat[0].view(q.shape), flat[1].view(k.shape)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, group = self.own_heads
        if self.qkv is not None:
            q, k, v = self.qkv(x).unflatten(-1, (keys, 3, self.head_dim)).split(1, -2)
            return q, k, v
        assert self.q is not None
        assert self.kv is not None
        x = self.q.region.enter(x)
        k, v = self.kv.inside(x).unflatten(-1, (keys, 2, self.head_dim)).split(1, -2)
        return self.q.inside(x).unflatten(-1, (keys, group, self.head_dim)), k, v
