"""What others may do with the modules of a GPT."""

import torch
from torch import Tensor, nn

from tedlab import Topology
from tedlab.config import ModelConfig, MoEConfig
from tedlab.models import GPT


class Nothing(nn.Module):
    """A block that returns what it is given."""

    def forward(self, x: Tensor, *others: Tensor | None) -> tuple[Tensor, None]:
        return x, None


def test_a_block_that_is_replaced_no_longer_runs(single: Topology) -> None:
    model = GPT(ModelConfig(2, 8, 2, 16, 4, vocab_size=12), MoEConfig(num_experts=0), single, seed=0)
    ids = torch.arange(8).view(2, 4)
    before = model(ids)[0]
    model.blocks[1] = Nothing()
    assert not torch.equal(model(ids)[0], before)
