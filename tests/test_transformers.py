"""A GPT with OLMoE's options is transformers' OLMoE: the same logits and gradients in float64 for the same weights.

Written by others, after the published model: what ``oracle.py`` and tedlab could have misread alike shows here. The
names of weights are written down a second time, so that a mistake in ``tedlab.models.families`` shows as well.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.steps import composed
from tedlab import Topology
from tedlab.certify.compare import relative_error
from tedlab.config import Gates, TrainConfig
from tedlab.exchange.verify import SinglePrecisionIsDouble
from tedlab.models import GPT

pytestmark = pytest.mark.slow  # importing transformers alone takes some seconds

SMALL = [
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.ffn=24", "model.sequence_length=16"),
    *("model.vocab_size=50", "moe.num_experts=8", "moe.top_k=3", "model.compile=none", "trainer.precision=64-true"),
]


def peer(config: TrainConfig) -> Any:
    """transformers' configuration of the same model."""
    from transformers import OlmoeConfig

    model, moe = config.model, config.moe
    return OlmoeConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        max_position_embeddings=model.sequence_length,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        norm_topk_prob=moe.router.gates == Gates.NORMALIZED,
        tie_word_embeddings=model.tie_embeddings,
        rms_norm_eps=model.norm_eps,
        use_cache=False,
        pad_token_id=None,  # its embedding would get no gradient
    )


def take_over(theirs: dict[str, Tensor], network: GPT, heads: int) -> None:
    """Puts transformers' weights into tedlab's model; that every parameter gets one is checked."""
    own = dict(network.named_parameters())

    def put(name: str, value: Tensor) -> None:
        local: Any = own.pop(name).detach()
        local.to_local().copy_(value)

    put("embedding.weight", theirs["model.embed_tokens.weight"])
    put("norm.weight", theirs["model.norm.weight"])
    put("output.weight", theirs["lm_head.weight"])
    for i in range(len(network.blocks)):
        layer, block = f"model.layers.{i}.", f"blocks.{i}."
        qkv = [theirs[f"{layer}self_attn.{part}_proj.weight"].unflatten(0, (heads, -1)) for part in "qkv"]
        halves = theirs[f"{layer}mlp.experts.gate_up_proj"].chunk(2, 1)
        put(f"{block}norm1.weight", theirs[f"{layer}input_layernorm.weight"])
        put(f"{block}norm2.weight", theirs[f"{layer}post_attention_layernorm.weight"])
        put(f"{block}attention.qkv.weight", torch.cat(qkv, 1).flatten(0, 1))  # head by head
        for norm in ("q_norm", "k_norm"):
            put(f"{block}attention.{norm}.weight", theirs[f"{layer}self_attn.{norm}.weight"])
        put(f"{block}attention.out.weight", theirs[f"{layer}self_attn.o_proj.weight"])
        put(f"{block}feed_forward.router.weight", theirs[f"{layer}mlp.gate.weight"])
        put(f"{block}feed_forward.experts.up", torch.stack(halves, 2).flatten(1, 2).mT)  # feature by feature
        put(f"{block}feed_forward.experts.down", theirs[f"{layer}mlp.experts.down_proj"].mT)
    assert not own, f"without a counterpart: {', '.join(own)}"


@pytest.fixture(scope="module")
def compared(single: Topology) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits, loss and gradients by tedlab's names: ours and theirs."""
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    config = composed(["preset=olmoe_1b_7b", *SMALL])
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (3, 17), generator=draw)
    tokens, targets = ids[:, :-1], ids[:, 1:].flatten()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with SinglePrecisionIsDouble():
            theirs = AutoModelForCausalLM.from_config(
                peer(config), attn_implementation="eager", experts_implementation="eager", dtype=torch.float64
            ).train()
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
