"""What ``model.compile`` compiles of a block."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tedlab import Topology
from tedlab.config import ModelConfig, MoEConfig, SharedConfig
from tedlab.models import GPT
from tedlab.models.wrap import wrap

MODEL = ModelConfig(layers=2, hidden=8, heads=2, ffn=16, sequence_length=4, vocab_size=32, activation="swiglu")


@pytest.fixture
def single() -> Iterator[Topology]:
    yield Topology.single()
    dist.destroy_process_group()


class Regions:
    """A backend that notes the operations of each region that it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.operations: list[set[str]] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes = [node for node in module.graph.nodes if node.op.startswith("call")]
        self.operations.append({getattr(node.target, "__name__", str(node.target)) for node in nodes})
        return module.forward


def gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    logits, _ = model(ids)
    model.zero_grad()
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.to_local() for p in model.parameters())]  # type: ignore[union-attr]


@pytest.mark.parametrize("experts", ["dropless", "capacity by kernels", "capacity"])
def test_what_surrounds_experts_that_are_left_out_is_compiled(single: Topology, experts: str) -> None:
    """Attention and norms before them in one region, the residual after them in another, and shared experts alone."""
    torch._dynamo.reset()
    kernel = "triton" if experts == "capacity by kernels" else "auto"
    moe = MoEConfig(4, dispatch=experts.split()[0], kernel=kernel, shared=SharedConfig(1))
    model, ids = GPT(MODEL, moe, single, seed=0).double(), torch.arange(8).view(2, 4)
    plain, regions = gradients(model, ids), Regions()
    wrap(model.blocks[1], single, None, regions)  # type: ignore[arg-type]
    for _ in range(2):  # once more compiles nothing more
        for ours, theirs in zip(gradients(model, ids), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    attending = ["scaled_dot_product_attention" in region for region in regions.operations]
    routing = ["argsort" in region or "topk" in region for region in regions.operations]
    if experts == "capacity":
        assert attending == routing == [True]
    else:
        assert attending == [True, False, False]
        assert "silu" in regions.operations[1]
        assert regions.operations[2] == {"add"}
