"""A decoder with experts on several GPUs as somebody writes it in plain torch: the peer of ``expert_parallel``.

Every process holds all dense weights and an equal part of the experts. Rows are sorted by expert, exchanged with
``all_to_all_single``, sorted again, multiplied in groups, and return the same way. It drops nothing, has no loss but
cross-entropy, and compiles what has static shapes.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from tedlab.config import ModelConfig, MoEConfig


class _Exchange(Function):
    """An all-to-all of rows, whose gradients go back."""

    @staticmethod
    def forward(ctx, rows, sent, received):  # type: ignore[no-untyped-def]
        ctx.splits = sent, received
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), received, sent)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        sent, received = ctx.splits
        out = grad.new_empty(sum(sent), grad.shape[1])
        dist.all_to_all_single(out, grad.contiguous(), sent, received)
        return out, None, None


class Experts(nn.Module):
    """Routes each token to its top-k experts by softmax, wherever they are."""

    def __init__(self, hidden: int, inner: int, moe: MoEConfig, processes: int) -> None:
        super().__init__()
        self.processes, self.here, self.top_k = processes, moe.num_experts // processes, moe.top_k
        self.router = nn.Linear(hidden, moe.num_experts, bias=False)
        self.up = nn.Parameter(torch.randn(self.here, hidden, 2 * inner) * 0.02)
        self.down = nn.Parameter(torch.randn(self.here, inner, hidden) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens (T, H) to (T, H)."""
        gates, experts = self.router(x).float().softmax(-1).topk(self.top_k, -1)
        order = experts.flatten().argsort(stable=True)
        counts = torch.bincount(experts.flatten(), minlength=self.processes * self.here)
        rows = x[order // self.top_k]
        arrived = counts.view(1, -1)
        if self.processes > 1:
            arrived = torch.empty_like(counts)
            dist.all_to_all_single(arrived, counts)
            arrived = arrived.view(self.processes, -1)
            sent = counts.view(self.processes, -1).sum(1)
            sent, received = torch.stack((sent, arrived.sum(1))).tolist()
            rows = _Exchange.apply(rows, sent, received)
            each = torch.arange(self.here, device=x.device).repeat(self.processes)
            sorting = each.repeat_interleave(arrived.flatten()).argsort(stable=True)
            rows = rows[sorting]
        ends = arrived.sum(0).cumsum(0).int()
        gate, linear = F.grouped_mm(rows, self.up.to(rows.dtype), offs=ends).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * linear, self.down.to(rows.dtype), offs=ends)
        if self.processes > 1:
            back = torch.empty_like(rows)
            back[sorting] = rows
            rows = _Exchange.apply(back, received, sent)
        results = torch.empty_like(rows)
        results[order] = rows
        return (results.view(*experts.shape, -1) * gates.to(x.dtype).unsqueeze(-1)).sum(1)


def feed_forward(hidden: int, inner: int) -> nn.Module:
    """Returns a GELU feed-forward layer with biases."""
    return nn.Sequential(nn.Linear(hidden, inner), nn.GELU(), nn.Linear(inner, hidden))


class Attention(nn.Module):
    """Causal attention, with rotary positions or without positions."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        hidden, length = model.hidden, model.sequence_length
        self.heads, self.dim, self.rotary = model.heads, hidden // model.heads, model.positions == "rotary"
        self.qkv, self.out = (nn.Linear(hidden, n * hidden, bias=model.bias) for n in (3, 1))
        angle = torch.outer(torch.arange(length), 10_000.0 ** (-torch.arange(0, self.dim, 2) / self.dim))
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angle.sin().repeat(1, 2), persistent=False)

    cos: Tensor
    sin: Tensor

    def _rotated(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return (x * self.cos + torch.cat((-second, first), -1) * self.sin).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, S, H) to (B, S, H)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.dim)).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = self._rotated(q), self._rotated(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Pre-norm blocks, some with experts and the others with a GELU feed-forward layer.

    Args:
        model: Sizes, norms, biases, positions, and whether the output projection is the embedding.
        moe: Experts, choices, and which blocks have experts.
        processes: Number of processes that share the experts.
        compiled: Whether what is not experts is compiled.
        make: Makes the experts of a block.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        processes: int,
        compiled: bool,
        make: Callable[[int, int, MoEConfig, int], nn.Module] = Experts,
    ) -> None:
        super().__init__()
        assert model.vocab_size is not None
        self.embedding = nn.Embedding(model.vocab_size, model.hidden)
        self.positions = nn.Embedding(model.sequence_length, model.hidden) if model.positions == "learned" else None
        norm = nn.RMSNorm if model.norm == "rms" else nn.LayerNorm
        self.norms = nn.ModuleList(norm(model.hidden) for _ in range(2 * model.layers + 1))
        self.attention = nn.ModuleList(Attention(model) for _ in range(model.layers))
        self.experts = nn.ModuleList()
        for i in range(model.layers):
            if i % moe.every == moe.every - 1:
                self.experts.append(make(model.hidden, model.ffn, moe, processes))
            else:
                self.experts.append(feed_forward(model.hidden, model.ffn))
                if compiled:
                    self.experts[i].compile()
        self.output = nn.Linear(model.hidden, model.vocab_size, bias=False)
        if model.tie_embeddings:
            self.output.weight = self.embedding.weight
        self._dense = torch.compile(self._before_experts) if compiled else self._before_experts

    def _before_experts(
        self, x: Tensor, attention: nn.Module, norm1: nn.Module, norm2: nn.Module
    ) -> tuple[Tensor, Tensor]:
        x = x + attention(norm1(x))
        return x, norm2(x)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the mean cross-entropy of the next tokens of ids (B, S + 1)."""
        x = self.embedding(ids[:, :-1])
        if self.positions is not None:
            x = x + self.positions.weight
        for i, (attention, experts) in enumerate(zip(self.attention, self.experts, strict=True)):
            x, inner = self._dense(x, attention, self.norms[2 * i], self.norms[2 * i + 1])
            x = x + experts(inner.flatten(0, 1)).view_as(x)
        return F.cross_entropy(self.output(self.norms[-1](x)).flatten(0, 1), ids[:, 1:].flatten())
