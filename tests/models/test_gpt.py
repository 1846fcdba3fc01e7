"""What others may do with the modules of a GPT."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tedlab import Topology
from tedlab.config import ModelConfig, MoEConfig, SharedConfig
from tedlab.models import GPT


class Nothing(nn.Module):
    """A block that returns what it is given."""

    def forward(self, x: Tensor, *others: Tensor | None) -> tuple[Tensor, None]:
        return x, None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"every": 1}, r"for block 0 there is none before it"),
        ({"shared": SharedConfig()}, r"needs shared experts"),
        ({"shortcut": "dgmoe"}, r"needs moe\.shared\.experts=0, not 1"),
    ],
)
def test_whoever_builds_a_model_is_told_what_a_shortcut_needs(
    single: Topology, wrong: dict[str, Any], said: str
) -> None:
    moe = MoEConfig(**{"num_experts": 4, "shared": SharedConfig(1), "shortcut": "pos2", **wrong})
    with pytest.raises(ValueError, match=said):
        GPT(ModelConfig(2, 8, 2, 16, 4, vocab_size=12), moe, single, seed=0)


def test_a_block_that_is_replaced_no_longer_runs(single: Topology) -> None:
    model = GPT(ModelConfig(2, 8, 2, 16, 4, vocab_size=12), MoEConfig(num_experts=0), single, seed=0)
    ids = torch.arange(8).view(2, 4)
    before = model(ids)[0]
    model.blocks[1] = Nothing()
    assert not torch.equal(model(ids)[0], before)
