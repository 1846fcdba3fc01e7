"""An independent judge: the models and the training that tedlab promises, in plain torch, from weights by name.

Nothing is imported from tedlab but the dataclasses of its configuration, and nothing is fast: one token after the other
queues for its experts, every formula is spelt out. One process, no shards, float64.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    biases: dict[str, Tensor]


@dataclass
class _Routed:
    """What one layer's router did to the T tokens of a micro-batch, or of a part of it.

    Attributes:
        probabilities: (T, E), each row sums to one.
        counted: (T, E), of each token the share of its choices that fell on an expert and that the loss counts.
        z: (T,) squares of the logits' logsumexp.
        load: (E,) choices, dropped ones too.
        dropped: choices whose expert was full.
    """

    probabilities: Tensor
    counted: Tensor
    z: Tensor
    load: Tensor
    dropped: int

    def samples(self, length: int) -> "list[_Routed]":
        """The losses' parts by sample."""
        parts = zip(self.probabilities.split(length), self.counted.split(length), self.z.split(length), strict=True)
        return [_Routed(*part, self.load, self.dropped) for part in parts]


# ---- the model ---------------------------------------------------------------------------------------------------


def logits(weights: Weights, ids: Tensor, model: ModelConfig, moe: MoEConfig, routed: list[_Routed]) -> Tensor:
    """(B, S, V) of token ids (B, S); what each router did is added to ``routed``."""
    samples, length = ids.shape
    x = weights["network.embedding.weight"][ids]
    if model.positions == "learned":
        x = x + weights["network.positions.weight"][:length]
    reads: list[Tensor] = []  # what each sub-layer so far has read
    for number in range(model.layers):
        block = {k.removeprefix(f"network.blocks.{number}."): w for k, w in weights.items() if f".{number}." in k}
        attended = _norm(block, "norm1", x, model)
        x = x + _attention(block, attended, model)
        inside = _norm(block, "norm2", x, model)
        reads += [attended, inside]
        if _has_experts(number, moe) and moe.shortcut == "dgmoe":
            first, second = (tensor.reshape(samples * length, -1) for tensor in (reads[-3], inside))
            x = x + _double_gated(block, first, second, length, model, moe, routed).reshape(x.shape)
        elif _has_experts(number, moe):
            z = reads[{"none": -1, "pos1": -2, "pos2": -3, "pos3": -4}[moe.shortcut]]
            flat, of_router = (tensor.reshape(samples * length, -1) for tensor in (inside, z))
            x = x + _mixture(block, flat, of_router, length, model, moe, routed).reshape(x.shape)
        else:
            x = x + _feed_forward(block, inside, model)
    top = {k.removeprefix("network."): w for k, w in weights.items()}
    output = weights["network.embedding.weight"] if model.tie_embeddings else weights["network.output.weight"]
    return _norm(top, "norm", x, model) @ output.T


def _has_experts(block: int, moe: MoEConfig) -> bool:
    if moe.blocks is not None:
        return block in moe.blocks
    return moe.num_experts > 0 and (block + 1) % moe.every == 0 and block >= moe.first_dense


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
    if model.activation == "clamped_swiglu":
        largest = torch.tensor(model.swiglu_limit, dtype=z.dtype)
        gate = torch.where(gate > largest, largest, gate)
        linear = torch.where(linear > largest, largest, torch.where(linear < -largest, -largest, linear))
        return gate / (1 + torch.exp(-1.702 * gate)) * (linear + 1)
    return gate / (1 + torch.exp(-gate)) * linear


def _feed_forward(weights: Weights, x: Tensor, model: ModelConfig, name: str = "feed_forward") -> Tensor:
    return _linear(weights, f"{name}.down", _activated(_linear(weights, f"{name}.up", x), model))


def _joined(weights: Weights, x: Tensor, mixed: Tensor, model: ModelConfig, moe: MoEConfig) -> Tensor:
    """The sum of what a token's own experts made and of what every token gets, weighted by what ``x`` says."""
    if not moe.shared.experts:
        return mixed
    y = _feed_forward(weights, x, model, "feed_forward.shared")
    if moe.shared.combine == "add":
        return mixed + y
    products = x @ weights["feed_forward.shared.gate.weight"].T
    if moe.shared.combine == "cg1":
        return mixed + y / (1 + torch.exp(-products))
    shares = torch.exp(products) / torch.exp(products).sum(-1, keepdim=True)
    return shares[:, 1:] * mixed + shares[:, :1] * y


def _double_gated(
    weights: Weights, u: Tensor, v: Tensor, length: int, model: ModelConfig, moe: MoEConfig, routed: list[_Routed]
) -> Tensor:
    """DGMoE: each token's ``u`` goes to its best expert, and its ``v`` to the best of the others."""
    preferred = _affinities(u @ weights["feed_forward.router.weight"].T, moe)
    preferred = preferred + weights.get("feed_forward.router.bias", torch.zeros(moe.num_experts))
    taken = [max(range(moe.num_experts), key=row.__getitem__) for row in preferred.tolist()]
    barred: list[int | None] = [*[None] * len(u), *taken]
    both = torch.cat((u, v))
    of_u, of_v = _mixture(weights, both, both, length, model, moe, routed, barred).chunk(2)
    return of_u + of_v


def _mixture(
    weights: Weights,
    own: Tensor,
    x: Tensor,
    length: int,
    model: ModelConfig,
    moe: MoEConfig,
    routed: list[_Routed],
    barred: Sequence[int | None] | None = None,
) -> Tensor:
    """What a block's experts make: those that every token goes to of ``own``, router and routed ones of ``x``.

    A token may be barred from an expert.
    """
    tokens, number = len(x), moe.num_experts
    scores = x @ weights["feed_forward.router.weight"].T
    if moe.router.bias:
        scores = scores + weights["feed_forward.router.logit_bias"]
    affinities = _affinities(scores, moe)
    bias = weights.get("feed_forward.router.bias", torch.zeros(number))
    preferences = (affinities.detach() + bias).tolist()
    for row, expert in zip(preferences, barred or [], strict=False):
        if expert is not None:
            row[expert] = -math.inf
    chosen = [_chosen(row, moe) for row in preferences]
    kept = _kept(chosen, affinities.tolist(), length, moe)
    gates = torch.stack([_gates(scores[t], affinities[t], experts, moe) for t, experts in enumerate(chosen)])
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
    counted, load = torch.zeros(tokens, number, dtype=torch.float64), torch.zeros(number, dtype=torch.int64)
    places = 1 if moe.balance.choices == "first" else moe.top_k
    for token, experts in enumerate(chosen):
        for place, expert in enumerate(experts):
            load[expert] += 1
            if place < places and (moe.balance.dropped or (token, place) in kept):
                counted[token, expert] += 1 / places
    routed.append(
        _Routed(
            affinities / affinities.sum(-1, keepdim=True),
            counted,
            torch.log(torch.exp(scores).sum(-1)) ** 2,
            load,
            tokens * moe.top_k - len(kept),
        )
    )
    return _joined(weights, own, y, model, moe)


def _affinities(scores: Tensor, moe: MoEConfig) -> Tensor:
    if moe.router.scoring == "sigmoid":
        return 1 / (1 + torch.exp(-scores))
    assert moe.router.scoring == "softmax"
    return torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)


def _chosen(preferences: Sequence[float], moe: MoEConfig) -> list[int]:
    """A token's experts, best first, of its best groups (DeepSeek-V2, §2.1.2; DeepSeek-V3, §2.1.2)."""
    size = moe.num_experts // moe.router.expert_groups
    groups = [range(start, start + size) for start in range(0, moe.num_experts, size)]
    best_of_group = {"max": 1, "top2": 2}[moe.router.group_score]
    merit = [sum(sorted((preferences[e] for e in group), reverse=True)[:best_of_group]) for group in groups]
    best = sorted(range(len(groups)), key=lambda number: -merit[number])[: moe.router.chosen_groups]
    allowed = [expert for number in sorted(best) for expert in groups[number]]
    return sorted(allowed, key=lambda expert: -preferences[expert])[: moe.top_k]


def _gates(scores: Tensor, affinities: Tensor, experts: list[int], moe: MoEConfig) -> Tensor:
    """The weights (K,) of a token's choices."""
    kind = moe.router.gates or ("raw" if moe.top_k == 1 else "normalized")
    if kind == "softmax":
        weights = torch.exp(scores[experts]) / torch.exp(scores[experts]).sum()
    else:
        weights = affinities[experts]
    if kind == "normalized":
        weights = weights / weights.sum()
    return weights * moe.router.gate_scale


def _kept(
    chosen: Sequence[Sequence[int]], affinities: Sequence[Sequence[float]], length: int, moe: MoEConfig
) -> set[tuple[int, int]]:
    """The choices, as (token, place), that find room.

    In their order: all first ones in order of the tokens, then all second ones; or the greatest affinity first.
    """
    tokens = len(chosen)
    everything = [(token, place) for place in range(moe.top_k) for token in range(tokens)]
    if moe.dispatch == "dropless" or moe.capacity_factor is None:
        return set(everything)
    if moe.drop_policy == "probs":
        everything.sort(key=lambda choice: -affinities[choice[0]][chosen[choice[0]][choice[1]]])
    groups = moe.capacity_groups or 1
    multiple = max(1, moe.capacity_multiple // groups)
    wanted = math.ceil(round(moe.top_k * (tokens // groups) / moe.num_experts * moe.capacity_factor, 9))
    room = math.ceil(wanted / multiple) * multiple
    taken: dict[tuple[int, int], int] = {}
    kept = set()
    for token, place in everything:
        queue = chosen[token][place], token % length * groups // length  # an expert, and a part of the positions
        taken[queue] = taken.get(queue, 0) + 1
        if taken[queue] <= room:
            kept.add((token, place))
    return kept


def _balance(together: Sequence[_Routed]) -> Tensor:
    """E·Σ f_e·P_e of all tokens whose load counts together (Switch Transformer, eq. 4)."""
    fractions = torch.cat([part.counted for part in together]).mean(0)
    probabilities = torch.cat([part.probabilities for part in together]).mean(0)
    return len(fractions) * (fractions * probabilities).sum()


def _losses(step: Sequence[_Routed], length: int, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """The balance loss and the z-loss of one layer, given all micro-batches of a step."""
    groups = {
        "micro_batch": [[part] for part in step],
        "sequence": [[sample] for part in step for sample in part.samples(length)],
        "global_batch": [list(step)],
    }[moe.balance.scope]
    return torch.stack([_balance(group) for group in groups]).mean(), torch.cat([part.z for part in step]).mean()


def _moved(bias: Tensor, load: Tensor, moe: MoEConfig) -> Tensor:
    """An expert's bias after a step in which it was chosen so often (DeepSeek-V3, §2.1.2)."""
    mean = sum(load.tolist()) / len(load)
    for expert, its in enumerate(load.tolist()):
        lack = 1 - its / mean
        if moe.router.bias_update == "sign":
            lack = (its < mean) - (its > mean)
        bias[expert] += moe.router.bias_rate * lack
    return bias


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
    now = {name: weight.double() for name, weight in weights.items() if not _is_bias_of_router(name)}
    biases = {
        f"network.blocks.{block}.feed_forward.router.bias": torch.zeros(moe.num_experts, dtype=torch.float64)
        for block in range(model.layers)
        if moe.router.bias_update != "none" and _has_experts(block, moe)
    }
    first = {name: torch.zeros_like(weight) for name, weight in now.items()}
    second = {name: torch.zeros_like(weight) for name, weight in now.items()}
    steps = []
    for number, micro_batches in enumerate(batches):
        losses, gradients, loads = _gradients(now, biases, micro_batches, model, moe)
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
        biases = {
            name: _moved(bias.clone(), load, moe)
            for (name, bias), load in zip(biases.items(), loads, strict=bool(biases))
        }
        steps.append(Step(losses, gradients, norm, factor, lr, dict(now), dict(first), dict(second), biases))
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


def _is_bias_of_router(name: str) -> bool:
    return name.endswith("router.bias")


def _gradients(
    weights: Weights, biases: Weights, micro_batches: Sequence[Tensor], model: ModelConfig, moe: MoEConfig
) -> tuple[dict[str, float], dict[str, Tensor], list[Tensor]]:
    """Losses of a whole step at once, their gradients, and of each router the load."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    losses, routed = [], []
    for batch in micro_batches:
        of_layers: list[_Routed] = []
        scores = logits({**leaves, **biases}, batch[:, :-1], model, moe, of_layers)
        normal = torch.log(torch.exp(scores).sum(-1))
        losses.append((normal - scores.gather(-1, batch[:, 1:, None]).squeeze(-1)).mean())
        routed.append(of_layers)
    total = torch.stack(losses).mean()
    found = {"train/loss": total.item()}
    layers = list(zip(*routed, strict=True))
    if layers:
        length = micro_batches[0].shape[1] - 1
        balance, z = torch.stack([torch.stack(_losses(layer, length, moe)) for layer in layers]).sum(0)
        total = total + moe.aux_loss * balance + moe.z_loss * z
        everything = [part for layer in layers for part in layer]
        found["train/aux_loss"] = balance.item() / len(layers)
        found["router/dropped_fraction"] = sum(p.dropped for p in everything) / sum(
            int(p.load.sum()) for p in everything
        )
    total.backward()
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return found, gradients, [torch.stack([part.load for part in layer]).sum(0) for layer in layers]
