"""An independent judge: the models and the training that tedlab promises, in plain torch, from weights by name.

Nothing is imported from tedlab but the dataclasses of its configuration, and nothing is fast: one token after the other
queues for its experts, every formula is spelt out. One process, no shards, float64.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tedlab.config import ModelConfig, MoEConfig

Weights = Mapping[str, Tensor]  # by the names of a consolidated checkpoint


@dataclass(frozen=True)
class Training:
    """How weights move."""

    lr: float
    schedule: str
    warmup_steps: int
    final_lr_fraction: float
    decay_fraction: float
    steps: int
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float | None


@dataclass
class Step:
    """What one step computes."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]
    norm: float
    clip_factor: float
    lr: float
    weights: dict[str, Tensor]
    first_moments: dict[str, Tensor]
    second_moments: dict[str, Tensor]


@dataclass
class _Report:
    balance: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    dropped: int = 0
    choices: int = 0


# ---- the model ---------------------------------------------------------------------------------------------------


def logits(weights: Weights, ids: Tensor, model: ModelConfig, moe: MoEConfig, report: _Report) -> Tensor:
    """(B, S, V) of token ids (B, S)."""
    samples, length = ids.shape
    x = weights["network.embedding.weight"][ids]
    if model.positions == "learned":
        x = x + weights["network.positions.weight"][:length]
    for number in range(model.layers):
        block = {k.removeprefix(f"network.blocks.{number}."): w for k, w in weights.items() if f".{number}." in k}
        x = x + _attention(block, _norm(block, "norm1", x, model), model)
        inside = _norm(block, "norm2", x, model)
        if moe.num_experts and (number + 1) % moe.every == 0:
            flat = inside.reshape(samples * length, -1)
            x = x + _mixture(block, flat, length, model, moe, report).reshape(x.shape)
        else:
            x = x + _feed_forward(block, inside, model)
    top = {k.removeprefix("network."): w for k, w in weights.items()}
    output = weights["network.embedding.weight"] if model.tie_embeddings else weights["network.output.weight"]
    return _norm(top, "norm", x, model) @ output.T


def _norm(weights: Weights, name: str, x: Tensor, model: ModelConfig) -> Tensor:
    if model.norm == "layer":
        x = x - x.sum(-1, keepdim=True) / x.shape[-1]
    x = x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + 1e-5)
    return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", torch.zeros(()))


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))


def _attention(weights: Weights, x: Tensor, model: ModelConfig) -> Tensor:
    """Head by head: rows of the projection are q, k, v of head 0, then of head 1, …"""
    length, width = x.shape[1], model.hidden // model.heads
    rows = _linear(weights, "attention.qkv", x)
    mixed = []
    for head in range(model.heads):
        q, k, v = rows[..., 3 * width * head : 3 * width * (head + 1)].split(width, -1)
        if model.positions == "rotary":
            q, k = _turned(q, model.rotary_base), _turned(k, model.rotary_base)
        scores = q @ k.transpose(1, 2) / math.sqrt(width)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf).exp()
        mixed.append(scores / scores.sum(-1, keepdim=True) @ v)
    return _linear(weights, "attention.out", torch.cat(mixed, -1))


def _turned(x: Tensor, base: float) -> Tensor:
    """Features i and i + d/2 of position p as one complex number, turned by the angle p · base^(-2i/d)."""
    length, width = x.shape[-2:]
    turns = base ** (-2.0 * torch.arange(width // 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * turns
    turned = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * torch.exp(1j * angles)
    return torch.cat((turned.real, turned.imag), -1)


def _activated(z: Tensor, model: ModelConfig) -> Tensor:
    if model.activation == "gelu":
        return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    gate, linear = z[..., 0::2], z[..., 1::2]
    return gate / (1 + torch.exp(-gate)) * linear


def _feed_forward(weights: Weights, x: Tensor, model: ModelConfig) -> Tensor:
    return _linear(weights, "feed_forward.down", _activated(_linear(weights, "feed_forward.up", x), model))


def _mixture(weights: Weights, x: Tensor, length: int, model: ModelConfig, moe: MoEConfig, report: _Report) -> Tensor:
    tokens, number = len(x), moe.num_experts
    scores = x @ weights["feed_forward.router.weight"].T
    probabilities = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
    chosen = [sorted(range(number), key=lambda e: -row[e])[: moe.top_k] for row in probabilities.tolist()]
    kept = _kept(chosen, tokens, length, moe)
    report.choices += tokens * moe.top_k
    report.dropped += tokens * moe.top_k - len(kept)
    gates = torch.stack([probabilities[token, experts] for token, experts in enumerate(chosen)])
    if moe.top_k > 1:
        gates = gates / gates.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for expert in range(number):
        z = x @ weights["feed_forward.experts.up"][expert]
        if model.bias:
            z = z + weights["feed_forward.experts.up_bias"][expert]
        result = _activated(z, model) @ weights["feed_forward.experts.down"][expert]
        if model.bias:
            result = result + weights["feed_forward.experts.down_bias"][expert]
        share = torch.zeros(tokens, moe.top_k, dtype=torch.bool)
        for token, place in kept:
            share[token, place] = chosen[token][place] == expert
        y = y + (gates * share).sum(-1, keepdim=True) * result
    first = torch.tensor([experts[0] for experts in chosen])
    fractions = torch.stack([(first == expert).double().mean() for expert in range(number)])
    report.balance.append(number * (fractions * probabilities.mean(0)).sum())
    report.z.append((torch.log(torch.exp(scores).sum(-1)) ** 2).mean())
    return y


def _kept(chosen: Sequence[Sequence[int]], tokens: int, length: int, moe: MoEConfig) -> list[tuple[int, int]]:
    """The choices, as (token, place), that find room: all first ones in order of the tokens, then all second ones."""
    everything = [(token, place) for place in range(moe.top_k) for token in range(tokens)]
    if moe.dispatch == "dropless" or moe.capacity_factor is None:
        return everything
    groups = moe.capacity_groups or 1
    multiple = max(1, moe.capacity_multiple // groups)
    wanted = math.ceil(round(moe.top_k * (tokens // groups) / moe.num_experts * moe.capacity_factor, 9))
    room = math.ceil(wanted / multiple) * multiple
    taken: dict[tuple[int, int], int] = {}
    kept = []
    for token, place in everything:
        queue = chosen[token][place], token % length * groups // length  # an expert, and a part of the positions
        taken[queue] = taken.get(queue, 0) + 1
        if taken[queue] <= room:
            kept.append((token, place))
    return kept


# ---- training ----------------------------------------------------------------------------------------------------


def train(
    weights: Weights, batches: Sequence[Sequence[Tensor]], model: ModelConfig, moe: MoEConfig, training: Training
) -> list[Step]:
    """Steps of AdamW (Loshchilov & Hutter 2019, algorithm 2).

    Args:
        weights: initial ones.
        batches: of every step its micro-batches (B, S + 1), of all data ranks; their gradients are averaged.
        model: architecture.
        moe: experts.
        training: the rest.
    """
    now = {name: weight.double() for name, weight in weights.items()}
    first = {name: torch.zeros_like(weight) for name, weight in now.items()}
    second = {name: torch.zeros_like(weight) for name, weight in now.items()}
    steps = []
    for number, micro_batches in enumerate(batches):
        losses, gradients = _mean_gradients(now, micro_batches, model, moe)
        norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients.values()))
        factor = 1.0 if training.clip is None else min(1.0, training.clip / (norm + 1e-6))
        lr = training.lr * rate(training, number)
        beta1, beta2 = training.betas
        for name, gradient in gradients.items():
            g = gradient * factor
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g * g
            m, v = first[name] / (1 - beta1 ** (number + 1)), second[name] / (1 - beta2 ** (number + 1))
            decay = training.weight_decay if _is_matrix(name) else 0.0
            now[name] = now[name] - lr * (m / (v.sqrt() + training.eps) + decay * now[name])
        steps.append(Step(losses, gradients, norm, factor, lr, dict(now), dict(first), dict(second)))
    return steps


def rate(training: Training, step: int) -> float:
    """The factor on the learning rate in a step, from 0: a ramp, and what follows it."""
    warmup, total, final = training.warmup_steps, training.steps, training.final_lr_fraction
    if step < warmup:
        return (1 + step) / warmup
    if training.schedule == "constant":
        return 1.0
    if training.schedule == "cosine":
        angle = math.pi * (step - warmup) / (total - warmup)
        return final + (1 - final) * math.cos(angle / 2) ** 2
    assert training.schedule == "wsd"
    return min(1.0, final + (1 - final) * (total - step) / (training.decay_fraction * total))


def _is_matrix(name: str) -> bool:
    """What weight decay pulls towards zero: tables and projections, neither biases nor what a norm multiplies by."""
    *path, last = name.split(".")
    return last in ("up", "down") or (last == "weight" and path[-1] not in ("norm", "norm1", "norm2"))


def _mean_gradients(
    weights: Weights, micro_batches: Sequence[Tensor], model: ModelConfig, moe: MoEConfig
) -> tuple[dict[str, float], dict[str, Tensor]]:
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    sums: dict[str, float] = {}
    total = torch.zeros((), dtype=torch.float64)
    for batch in micro_batches:
        report = _Report()
        scores = logits(leaves, batch[:, :-1], model, moe, report)
        normal = torch.log(torch.exp(scores).sum(-1))
        loss = (normal - scores.gather(-1, batch[:, 1:, None]).squeeze(-1)).mean()
        found = {"train/loss": loss.item()}
        if report.balance:
            found["train/aux_loss"] = sum(report.balance).item() / len(report.balance)
            found["router/dropped_fraction"] = report.dropped / report.choices
            loss = loss + moe.aux_loss * sum(report.balance) + moe.z_loss * sum(report.z)
        total = total + loss / len(micro_batches)
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value / len(micro_batches)
    total.backward()
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return sums, gradients
