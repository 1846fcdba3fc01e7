"""The benchmark's router draws experts by Zipf's law."""

import torch

from benchmarks.skewed import EXPONENT
from tedlab import Topology
from tedlab.config import MoEConfig
from tedlab.moe import MoELayer
from tedlab.moe.layer import MoESpec
from tedlab.nn import FeedForwardSpec, Init


def test_the_first_expert_is_chosen_as_often_as_zipf_says(single: Topology) -> None:
    moe = MoEConfig(num_experts=8, top_k=1, every=1, dispatch="dropless", gating="zipf")
    layer = MoELayer(MoESpec(FeedForwardSpec(4, 8, Init(), Init()), moe), single)
    _, report = layer(torch.randn(2, 4096, 4))
    share = torch.arange(1, 9, dtype=torch.float64) ** -EXPONENT
    torch.testing.assert_close(report.load.double() / 8192, share / share.sum(), rtol=0, atol=0.02)
