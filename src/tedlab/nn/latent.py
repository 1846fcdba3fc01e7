"""Multi-head latent attention (DeepSeek-V2): keys and values of all heads are made of a few features of each token.

A token's latent, and a key with its position that all heads share, are all that later tokens need of it. They are
computed outside the region of the heads, where tensor ranks hold the same activations or their own positions, and enter
it in place of the wider activations. B samples, S positions, h heads of this rank.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tedlab.comm import to_compute_dtype
from tedlab.config import ModelConfig
from tedlab.degrees import ParallelDegrees, check_divides
from tedlab.nn.attend import AttentionPath, attend, attention_path, new_pairs, visible_pairs
from tedlab.nn.linear import (
    ColumnParallelLinear,
    ColumnParallelSpec,
    ReplicatedLinear,
    ReplicatedSpec,
    RowParallelLinear,
    RowParallelSpec,
)
from tedlab.nn.norm import NormSpec, RMSNorm
from tedlab.nn.past import Past
from tedlab.nn.region import enter_sites, tensor_region
from tedlab.nn.rotary import latent_score_factor, rotate, rotate_backward, rotate_forward
from tedlab.spec import Init, Layout, MicroBatch, Sites, Spec, Work, WorkingSet
from tedlab.topology import Topology

_EPS = 1e-6  # of the latents' norms, in all published models, whatever other norms have


@dataclass(frozen=True)
class LatentNormSpec(NormSpec):
    """Describes an RMSNorm of what a projection has just made."""

    def given(self, b: MicroBatch) -> tuple[int, torch.dtype]:
        return b.outside * self.hidden, b.compute


@dataclass(frozen=True)
class LatentAttentionSpec(Spec):
    """Describes a :class:`LatentAttention`.

    Attributes:
        hidden: Model width.
        heads: Number of heads, a multiple of the tensor degree.
        kv_rank: Features of the latent that keys and values are made of.
        q_rank: Features of the latent that queries are made of; None: they are made of activations.
        nope_dim, rope_dim, v_dim: Features of a head: of queries and keys without and with a position, and of values.
        init, out_init: Initial weights of projections into the layer and out of it.
        bias: Whether the projections of activations to latents (not to queries) have biases.
        out_bias: Whether the output projection has a bias.
        scale: Factor on scores, beside that of their width.
    """

    parts = ("q", "q_down", "q_norm", "q_up", "kv_down", "kv_norm", "kv_up", "out")
    hidden: int
    heads: int
    kv_rank: int
    q_rank: int | None
    nope_dim: int
    rope_dim: int
    v_dim: int
    init: Init
    out_init: Init
    bias: bool = False
    out_bias: bool = False
    scale: float = 1.0

    @classmethod
    def of(cls, model: ModelConfig, init: Init, out_init: Init) -> "LatentAttentionSpec":
        """Describes the attention of a model's blocks, which ``model.attention.latent`` says to be this."""
        latent, attention = model.attention.latent, model.attention
        assert latent.kv_rank is not None
        sizes = latent.kv_rank, latent.q_rank, latent.nope_dim, latent.rope_dim, latent.v_dim
        bias, out = (model.bias if own is None else own for own in (attention.qkv_bias, attention.out_bias))
        return cls(model.hidden, model.heads, *sizes, init, out_init, bias, out, latent_score_factor(model.rotary))

    @property
    def width(self) -> int:
        """The number of features of a head of queries or keys."""
        return self.nope_dim + self.rope_dim

    @property
    def rotary_dim(self) -> int:
        """The number of features of a head that are rotated."""
        return self.rope_dim

    def path(self, device: str, dtype: torch.dtype, length: int, documents: bool = False) -> AttentionPath:
        """Returns the way that attention over so many tokens is computed, see :func:`tedlab.nn.attention_path`."""
        return attention_path(device, dtype, (self.width, self.v_dim), documents=documents)

    def check(self, degrees: ParallelDegrees) -> None:
        check_divides("model.heads", self.heads, "parallel.tensor", degrees.tensor)

    @property
    def q(self) -> ColumnParallelSpec | None:
        return self._queries if self.q_rank is None else None

    @property
    def q_down(self) -> ReplicatedSpec | None:
        return None if self.q_rank is None else self._down(self.q_rank)

    @property
    def q_norm(self) -> NormSpec | None:
        return None if self.q_rank is None else LatentNormSpec(self.q_rank, "rms", _EPS)

    @property
    def q_up(self) -> ColumnParallelSpec | None:
        return None if self.q_rank is None else self._queries

    @property
    def kv_down(self) -> ReplicatedSpec:
        return self._down(self.kv_rank, self.rope_dim)

    @property
    def kv_norm(self) -> NormSpec:
        return LatentNormSpec(self.kv_rank, "rms", _EPS)

    @property
    def kv_up(self) -> ColumnParallelSpec:
        features = self.heads * (self.nope_dim + self.v_dim)
        parts = self.nope_dim, self.v_dim
        return ColumnParallelSpec(self.kv_rank, features, "attention.latent", self.init, bias=False, alternating=parts)

    @property
    def out(self) -> RowParallelSpec:
        return RowParallelSpec(self.heads * self.v_dim, self.hidden, "attention", self.out_init, self.out_bias)

    @property
    def _queries(self) -> ColumnParallelSpec:
        features = self.q_rank or self.hidden
        return ColumnParallelSpec(features, self.heads * self.width, "attention", self.init, bias=False)

    def _down(self, *features: int) -> ReplicatedSpec:
        parts = features if features[1:] else ()
        return ReplicatedSpec(self.hidden, sum(features), "attention", self.init, self.bias, alternating=parts)

    def sites(self, layout: Layout) -> Sites:
        queries = enter_sites("attention", self.q_rank or self.hidden, layout)
        latent = enter_sites("attention.latent", self.kv_rank + self.rope_dim, layout)
        return queries.then(latent).then(self.out.sites(layout))

    def flops(self, length: int) -> Counter[str]:
        """Counts the scores and weighted sums of visible pairs only: a token attends to tokens up to itself."""
        projections = super().flops(length).total()
        scores = 2 * visible_pairs(length, None) * self.heads * (self.width + self.v_dim) / length
        return Counter(attention_projections=projections, attention_scores=round(scores))

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        if b.mixed:
            yield b.moved(b.outside * self.hidden, b.parameter, b.compute)
        for part in (self.q_down, self.q_norm, self.kv_down, self.kv_norm):
            if part is not None:
                yield from part.forward(b)
        yield b.moved(2 * b.outside * (self.kv_rank + self.rope_dim))  # the normed latent and the key, side by side
        yield from self._entered(b, self._queries)
        for elements in (self._heads(b, self.rope_dim), b.tokens * self.rope_dim):
            yield from rotate_forward(b, elements)
        if b.past:
            yield from self._with_past(b)
            yield from self.out.forward(b, dead)
            return
        yield from self._entered(b, self.kv_up)
        for width in (self.width, self.width, self.v_dim):  # parts of queries and of keys, side by side; values alone
            yield b.moved(2 * self._heads(b, width))
        yield self._scores(b, flops=(2, 2), sides=2)
        yield from self.out.forward(b, dead)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        yield from self.out.backward(b)
        yield self._scores(b, flops=(6, 4), sides=4)
        yield b.moved(self._heads(b, self.rope_dim))  # sums the shared key's gradient over heads
        for elements in (self._heads(b, self.rope_dim), b.tokens * self.rope_dim):
            yield from rotate_backward(b, elements)
        for width in (self.width, self.nope_dim + self.v_dim):  # gradients of parts, side by side
            yield b.moved(2 * self._heads(b, width))
        for up in (self.kv_up, self._queries):
            yield from up.backward(b)
        yield b.moved(4 * b.outside * (self.kv_rank + self.rope_dim))
        for part in (self.kv_norm, self.kv_down, self.q_norm, self.q_down):
            if part is not None:
                yield from part.backward(b)
        yield b.moved(3 * b.outside * self.hidden)  # adds the gradients of the input

    def saved(self, b: MicroBatch) -> int:
        """Counts the input, latents before and after their norms, queries, keys and values, and a number per row."""
        latents = self.kv_rank + self.rope_dim + (self.q_rank or 0)
        elements = b.outside * (self.hidden + latents) + b.tokens * latents
        if self.q_rank is None and b.layout.sequence:
            elements += b.tokens * self.hidden  # the input again, gathered
        elements += self._heads(b, 2 * self.width + self.v_dim)
        ups = (self._queries, self.kv_up, self.q_down, self.kv_down)
        converted = sum(k * n for part in ups if part is not None for k, n in [part.widths(b)]) if b.mixed else 0
        own = (elements + converted) * b.compute.itemsize
        return own + b.tokens * self.heads // b.tensor * 4 + self.out.saved(b)

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        gradients = 2 * self._heads(b, 2 * self.width + self.v_dim)
        yield WorkingSet("attention", temporaries=gradients * b.compute.itemsize)

    def remembered(self, tensor: int) -> int:
        """Returns the elements of a token that :class:`~tedlab.nn.Past` keeps in each tensor rank."""
        return self.kv_rank + self.rope_dim

    def _heads(self, b: MicroBatch, width: int) -> int:
        """Returns the number of elements of this rank's heads, each of so many features."""
        return b.tokens * self.heads * width // b.tensor

    def _entered(self, b: MicroBatch, part: ColumnParallelSpec) -> Iterator[Work]:
        """Yields the work of a projection whose input has been converted before it entered."""
        k, n = part.widths(b)
        if b.mixed:
            yield b.moved(k * n, b.parameter, b.compute)
        if b.layout.sequence:  # reorders by position
            yield b.moved(2 * b.tokens * k)
        yield b.product(b.tokens, k, n)

    def _with_past(self, b: MicroBatch) -> Iterator[Work]:
        """Yields the kernels that attend to remembered latents, which all heads share, see :class:`LatentAttention`."""
        heads, shared = self.heads // b.tensor, self.kv_rank + self.rope_dim
        yield b.product(b.tokens, self.nope_dim, self.kv_rank, times=heads)
        yield b.moved(2 * self._heads(b, shared))
        pairs = new_pairs(b.past, b.length, None) / b.length
        read = b.tokens // b.length * (b.past + b.length) * shared
        size = (read + self._heads(b, shared + self.kv_rank)) * b.compute.itemsize
        yield Work(2 * self._heads(b, shared + self.kv_rank) * pairs, size, b.compute, "attention")
        yield b.product(b.tokens, self.kv_rank, self.v_dim, times=heads)

    def _scores(self, b: MicroBatch, flops: tuple[int, int], sides: int) -> Work:
        """Returns the kernel of this rank's heads: FLOPs per visible pair and feature of keys, and of values."""
        pairs = visible_pairs(b.length, None) / b.length
        size = sides * self._heads(b, self.width + self.v_dim) * b.compute.itemsize
        per_pair = self._heads(b, self.width) * flops[0] + self._heads(b, self.v_dim) * flops[1]
        return Work(per_pair * pairs, size, b.compute, "attention")


class LatentAttention(nn.Module):
    """Causal attention whose keys and values are made of latents; each tensor rank computes heads / T of the heads.

    Rows of ``q`` and ``q_up`` are ordered by head: features without a position, then those that are rotated. Rows of
    ``kv_up`` are ordered by head: its key's features without a position, then its value's. The rows of ``kv_down`` are
    the latent's, then the shared key's.
    """

    def __init__(self, spec: LatentAttentionSpec, topology: Topology) -> None:
        super().__init__()
        self.nope_dim, self.rope_dim, self.v_dim, self.kv_rank = spec.nope_dim, spec.rope_dim, spec.v_dim, spec.kv_rank
        self.scale = spec.scale * spec.width**-0.5
        self.past: Past | None = None
        self.context = topology.context
        self.q = None if spec.q is None else ColumnParallelLinear(spec.q, topology)
        self.q_down = None if spec.q_down is None else ReplicatedLinear(spec.q_down, topology)
        self.q_norm = None if spec.q_norm is None else RMSNorm(spec.q_norm, topology)
        self.q_up = None if spec.q_up is None else ColumnParallelLinear(spec.q_up, topology)
        self.region = tensor_region(topology, "attention.latent")
        self.kv_down = ReplicatedLinear(spec.kv_down, topology)
        self.kv_norm = RMSNorm(spec.kv_norm, topology)
        self.kv_up = ColumnParallelLinear(spec.kv_up, topology)
        self.out = RowParallelLinear(spec.out, topology)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Maps (B, S, H) to (B, S, H).

        Args:
            x: Activations outside, see ``region.py``.
            rotation: (2, S, rope_dim/2), see :func:`tedlab.nn.rotation`, or (2, B, S, rope_dim/2) if samples' positions
                differ.
        """
        assert rotation is not None
        x, turns = to_compute_dtype(x), rotation.unsqueeze(-2)
        q = self._queries(x, turns)
        latent, key = self.compress(x, turns)
        if self.past is not None:
            all_latents, all_keys = self.past.extend(id(self), latent, key)
            if not self.past.begins:
                return self._output(self._with_past(q, all_latents, all_keys, self.past))
        k, v = self.expand(latent, key)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return self._output(attend(q, k, v, scale=self.scale, documents=self.context.documents))

    def _with_past(self, q: Tensor, latent: Tensor, key: Tensor, past: Past) -> Tensor:
        """Attends to latents, which all heads share: what made keys and values of them is applied to queries and sums.

        Products with the latents of the whole text are so made once for each new token, and not for each old one.
        """
        up = self.kv_up.local("weight").unflatten(0, (-1, self.nope_dim + self.v_dim)).to(q.dtype)
        to_keys, to_values = up.split((self.nope_dim, self.v_dim), 1)  # (h, nope_dim, kv_rank), (h, v_dim, kv_rank)
        own, turned = q.transpose(1, 2).split((self.nope_dim, self.rope_dim), -1)  # (B, h, S, …)
        q = torch.cat((own @ to_keys, turned), -1)
        k = torch.cat((latent.unsqueeze(2), key), -1).transpose(1, 2)
        return past.attend(q, k, latent.unsqueeze(1), scale=self.scale) @ to_values.mT

    def _output(self, y: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(-2))  # of (B, h, S, v_dim)

    def compress(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """Returns all that later tokens need of each token: its latent (B, S, kv_rank) and key (B, S, 1, rope_dim).

        Args:
            x: Activations outside (B, S, H).
            turns: (2, S, 1, rope_dim/2).
        """
        latent, key = self.kv_down(x).split((self.kv_rank, self.rope_dim), -1)
        entered = self.region.enter(torch.cat((self.kv_norm(latent), key), -1))
        latent, key = entered.split((self.kv_rank, self.rope_dim), -1)
        return latent, rotate(key.unsqueeze(-2), turns)

    def expand(self, latent: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys (B, S, h, nope_dim + rope_dim) and values (B, S, h, v_dim) of this rank's heads."""
        made = self.kv_up.inside(latent).unflatten(-1, (-1, self.nope_dim + self.v_dim))
        own, v = made.split((self.nope_dim, self.v_dim), -1)
        k = torch.cat((own, key.expand(*own.shape[:-1], -1)), -1)
        return k, v.clone()  # a view would keep the keys' features alive, too

    def _queries(self, x: Tensor, turns: Tensor) -> Tensor:
        if self.q is not None:
            q = self.q(x)
        else:
            assert self.q_down is not None
            assert self.q_norm is not None
            assert self.q_up is not None
            q = self.q_up(self.q_norm(self.q_down(x)))
        own, turned = q.unflatten(-1, (-1, self.nope_dim + self.rope_dim)).split((self.nope_dim, self.rope_dim), -1)
        return torch.cat((own, rotate(turned, turns)), -1)
