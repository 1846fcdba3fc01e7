"""Experts that compute without gradients, some at a time, compute what they do in training."""

import pytest
import torch

from tedlab import Topology
from tedlab.config import MoEConfig
from tedlab.moe import MoELayer, MoESpec, evaluating
from tedlab.nn import FeedForwardSpec, initialize
from tedlab.spec import Init


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
                torch.testing.assert_close(layer(x, mask)[0], expected.detach(), rtol=1e-12, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)
