"""Experts that compute without gradients, some at a time, compute what they do in training."""

import pytest
import torch
import torch.nn.functional as F

from tedlab import ParallelDegrees, Topology
from tedlab.config import ModelConfig, MoEConfig
from tedlab.models import GPT
from tedlab.moe import Experts, MoELayer, MoESpec, evaluating
from tedlab.nn import FeedForwardSpec, initialize
from tedlab.spec import Init
from tests.pool import WorkerPool

MOE = MoEConfig(num_experts=4, top_k=2, dispatch="dropless", capacity_factor=None)


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "clamped_swiglu"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 512])
def test_experts_in_pieces_compute_what_training_does(
    single: Topology, activation: str, padded: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most experts have rows, some have none, and no piece but the last is full; biases are not zero."""
    monkeypatch.setattr(evaluating, "_ROWS", rows)
    torch.set_default_dtype(torch.float64)
    try:
        inner = FeedForwardSpec(6, 10, Init(std=0.5), Init(std=0.5), activation, bias=True, limit=1.0)
        layer = MoELayer(MoESpec(inner, MoEConfig(16, top_k=3, dispatch="dropless", capacity_factor=None)), single)
        initialize(layer, 3)
        for name in ("up_bias", "down_bias"):
            getattr(layer.experts, name).data.to_local().normal_(generator=torch.Generator().manual_seed(5))
        for tokens in (1, 9):
            x = torch.randn(1, tokens, 6, generator=torch.Generator().manual_seed(tokens))
            mask = torch.arange(tokens).unsqueeze(0) == tokens - 1 if padded else None
            expected, report = layer(x, mask)
            assert tokens == 9 or (report.load == 0).any()
            with torch.no_grad():
                assert torch.equal(layer.train()(x, mask)[0], expected), "a step that only counts must choose alike"
                torch.testing.assert_close(layer.eval()(x, mask)[0], expected.detach(), rtol=1e-12, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def biased(activation: str, topology: Topology) -> GPT:
    """Returns a model whose experts' second biases are random, and whose first ones are all 0.5."""
    config = ModelConfig(2, 16, 4, 24, sequence_length=24, vocab_size=32, init_std=0.3, activation=activation)
    model = GPT(config, MOE, topology, seed=0).eval()
    draw = torch.Generator().manual_seed(1)
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        experts.up_bias.data.to_local().fill_(0.5)
        experts.down_bias.data.to_local().normal_(generator=draw)
    return model


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(32, (2, 8, 24), generator=torch.Generator().manual_seed(2)).unbind()


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "clamped_swiglu"])
def test_autocast_rounds_as_in_a_pass_that_is_differentiated(single: Topology, activation: str) -> None:
    """With a capacity, where both passes run the same operations, losses differ by less than 1e-6."""
    model, (ids, targets) = biased(activation, single), texts()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = model.token_losses(ids, targets)
        logits = model(ids)[0]
    assert logits.requires_grad
    expected = F.cross_entropy(logits.detach().flatten(0, 1).float(), targets.flatten(), reduction="none")
    torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=2e-6)


def losses(tensor: int) -> torch.Tensor:
    torch.set_default_dtype(torch.float64)
    try:
        return biased("swiglu", Topology(ParallelDegrees(tensor, tensor))).token_losses(*texts())[0]
    finally:
        torch.set_default_dtype(torch.float32)


def test_one_tensor_rank_adds_the_second_bias(pool: WorkerPool) -> None:
    (one,) = pool.run(1, losses, 1)
    for found in pool.run(2, losses, 2):
        torch.testing.assert_close(found, one, rtol=1e-12, atol=1e-12)
