"""The coordinate check of Yang et al. (arXiv 2203.03466, app. D): how far a few steps move activations, by width."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tedlab import ParallelDegrees, Topology
from tedlab.config import ModelConfig, MoEConfig, OptimConfig
from tedlab.models import GPT, Block, GPTSpec
from tedlab.module import optimizer_with_schedule, parameter_groups
from tedlab.moe import Router
from tedlab.optim import Grouping
from tedlab.parametrization import scales

HEAD = 16  # width of a head, at every width of the model
VOCABULARY, LENGTH, SAMPLES = 64, 4, 1  # fewer tokens than features, as in the limit of infinite width
BATCH = 32  # samples of a step that trains for the sake of its loss
ADAMW: dict[str, Any] = {"_target_": "torch.optim.AdamW", "betas": [0.9, 0.95], "weight_decay": 0.1}

Moves = dict[str, list[float]]  # by activation, for each number of steps


def model_of(hidden: int, base: int | None, parametrization: str) -> ModelConfig:
    """A small model of a width, with untied embeddings."""
    return ModelConfig(
        layers=2,
        hidden=hidden,
        heads=hidden // HEAD,
        ffn=2 * hidden,
        sequence_length=LENGTH,
        vocab_size=VOCABULARY,
        tie_embeddings=False,
        init_std=0.02,
        parametrization=parametrization,
        base_hidden=base,
    )


def moves(model: ModelConfig, lr: float, steps: int, seed: int, optimizer: dict[str, Any] = ADAMW) -> Moves:
    """Trains on one batch, and returns the mean size of what each activation changed by since the first step.

    Activations are those that layers add to the residual stream, routers' logits, and logits.

    Args:
        model: The architecture, whose second block has four experts.
        lr: The learning rate.
        steps: The number of steps.
        seed: Of weights and batch.
        optimizer: ``optim.optimizer``.
    """
    network, stepped = _made(model, lr, steps, seed, optimizer)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (SAMPLES, LENGTH + 1), generator=generator)
    found: dict[str, list[Tensor]] = defaultdict(list)
    _record(network, found)
    for _ in range(steps):
        loss, _ = network.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        stepped.step()
        stepped.zero_grad()
    network.loss(ids[:, :-1], ids[:, 1:])
    return {name: [float((x - of[0]).abs().mean()) for x in of[1:]] for name, of in found.items()}


def trained(model: ModelConfig, lr: float, steps: int, seed: int) -> float:
    """Trains on a Markov chain in which every token has two successors, and returns the loss of the last ten steps."""
    network, stepped = _made(model, lr, steps, seed, ADAMW)
    generator = torch.Generator().manual_seed(seed)
    successors_V2 = torch.randint(VOCABULARY, (VOCABULARY, 2), generator=generator)
    losses = []
    for _ in range(steps):
        tokens = [torch.randint(VOCABULARY, (BATCH,), generator=generator)]
        for _ in range(LENGTH):
            tokens.append(successors_V2[tokens[-1], torch.randint(2, (BATCH,), generator=generator)])
        ids = torch.stack(tokens, 1)
        loss, _ = network.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        stepped.step()
        stepped.zero_grad()
        losses.append(loss.item())
    return float(np.mean(losses[-10:]))


def _made(
    model: ModelConfig, lr: float, steps: int, seed: int, optimizer: dict[str, Any]
) -> tuple[GPT, torch.optim.Optimizer]:
    """Returns a model and the optimizer that a run would have."""
    moe = MoEConfig(4, top_k=2, dispatch="dropless")
    optim = OptimConfig(optimizer=optimizer, lr=lr, schedule="constant")
    network = GPT(model, moe, Topology(ParallelDegrees(1)), seed)
    grouping = Grouping.under(optim, scales(GPTSpec, model, moe))
    return network, optimizer_with_schedule(optim, parameter_groups(network, grouping, optim), steps)[0]


def slopes(widths: Sequence[int], by_width: Sequence[Moves], step: int) -> dict[str, float]:
    """Returns the powers of the width with which activations' moves grow, by a line through their logarithms."""
    logs = {name: [np.log(of[name][step]) for of in by_width] for name in by_width[0]}
    return {name: float(np.polyfit(np.log(widths), values, 1)[0]) for name, values in logs.items()}


def _record(network: GPT, found: dict[str, list[Tensor]]) -> None:
    """Makes forward passes append activations."""

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name].append((output[0] if isinstance(output, tuple) else output).detach())

        return hook

    def keep_logits(name: str) -> Any:
        def hook(module: Router, inputs: Any) -> None:
            found[name].append((inputs[0] @ module.local("weight").T).detach())

        return hook

    for index, block in enumerate(network.blocks):
        assert isinstance(block, Block)
        block.attention.register_forward_hook(keep(f"attention {index}"))
        kind = "experts" if block.routed else "feed-forward"
        block.feed_forward.register_forward_hook(keep(f"{kind} {index}"))
        for module in block.modules():
            if isinstance(module, Router):
                module.register_forward_pre_hook(keep_logits(f"router {index}"))
    assert network.output is not None
    network.output.register_forward_hook(keep("logits"))
