"""A GPT with OLMoE's options is transformers' OLMoE: the same logits and gradients in float64 for the same weights.

Written by others, after the published model: what ``oracle.py`` and tedlab could have misread alike shows here. Of
transformers' layers only the norms of queries and keys are taken out, which tedlab does not have.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.steps import composed
from benchmarks.vs_transformers import SHAPES, take_over
from tedlab import Topology
from tedlab.certify.compare import relative_error
from tedlab.models import GPT

pytestmark = pytest.mark.slow  # importing transformers alone takes some seconds

SMALL = [
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.ffn=24", "model.sequence_length=16"),
    *("model.vocab_size=50", "moe.num_experts=8", "moe.top_k=3", "model.compile=none", "trainer.precision=64-true"),
]


class SinglePrecisionIsDouble(TorchFunctionMode):
    """transformers computes norms, rotations and gates in float32, whatever the model's precision: here in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            return args[0].double()
        return func(*map(widened, args), **{name: widened(value) for name, value in (kwargs or {}).items()})


@pytest.fixture(scope="module")
def compared(single: Topology) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits, loss and gradients by tedlab's names: ours and theirs."""
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    shape = SHAPES["olmoe"]
    config = composed([*shape.overrides, *SMALL])
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (3, 17), generator=draw)
    tokens, targets = ids[:, :-1], ids[:, 1:].flatten()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with SinglePrecisionIsDouble():
            theirs = AutoModelForCausalLM.from_config(
                shape.peer(config), attn_implementation="eager", experts_implementation="eager", dtype=torch.float64
            ).train()
            for module in theirs.modules():
                for name in ("q_norm", "k_norm"):
                    if hasattr(module, name):
                        setattr(module, name, nn.Identity())
            for parameter in theirs.parameters():  # norms are 1 and other weights small by themselves
                parameter.data.normal_(0.3, 0.5, generator=draw)
            their_logits = theirs(input_ids=tokens).logits
            their_loss = nn.functional.cross_entropy(their_logits.flatten(0, 1), targets)
            their_loss.backward()
        ours = GPT(config.model, config.moe, single, seed=0)
        expected = GPT(config.model, config.moe, single, seed=0)
        take_over(theirs.state_dict(), ours, config.model.heads)
        gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
        take_over(gradients, expected, config.model.heads)
        logits = ours(tokens)[0]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets)
        loss.backward()
        mine = {name: p.grad.to_local() for name, p in ours.named_parameters()}
        others = {name: p.detach().to_local() for name, p in expected.named_parameters()}
        return (
            {"logits": logits.detach(), "loss": loss.detach(), **mine},
            {"logits": their_logits.detach(), "loss": their_loss.detach(), **others},
        )
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("quantity", ["logits", "loss"])
def test_outputs_are_those_of_transformers(
    compared: tuple[dict[str, Tensor], dict[str, Tensor]], quantity: str
) -> None:
    ours, theirs = compared
    assert ours[quantity].dtype == theirs[quantity].dtype == torch.float64
    assert relative_error(ours[quantity], theirs[quantity]) < 1e-12


def test_every_gradient_is_that_of_transformers(compared: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    ours, theirs = compared
    assert ours.keys() == theirs.keys()
    assert any("experts" in name for name in ours)
    assert any("router" in name for name in ours)
    assert all(value.abs().max() > 0 for value in theirs.values())
    wrong = {name: relative_error(ours[name], theirs[name]) for name in ours}
    assert max(wrong.values()) < 1e-10, wrong
