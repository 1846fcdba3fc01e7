"""``moe.shortcut=pos2`` is the wiring of transformers' LongCat-Flash: the same logits and gradients in float64.

Its two latents are as wide as the model, for which its scales of them are 1; it has no experts that do nothing.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tedlab import Topology
from tedlab.certify.compare import relative_error
from tedlab.config import AttentionConfig, LatentConfig, ModelConfig, MoEConfig, RouterConfig, SharedConfig
from tedlab.exchange.verify import SinglePrecisionIsDouble
from tedlab.models import GPT
from tedlab.models.families.deepseek import DeepSeekV3
from tedlab.models.families.family import feed_forward
from tedlab.models.families.mapping import Rule

pytestmark = pytest.mark.slow  # importing transformers alone takes some seconds

PAIRS, HIDDEN, HEADS, EXPERTS, LENGTH = 2, 24, 2, 5, 9
LATENT = LatentConfig(kv_rank=HIDDEN, q_rank=HIDDEN, nope_dim=6, rope_dim=4, v_dim=8)
MODEL = ModelConfig(
    **{"layers": 2 * PAIRS, "hidden": HIDDEN, "heads": HEADS, "ffn": 20, "sequence_length": LENGTH, "vocab_size": 40},
    **{"activation": "swiglu", "bias": False, "norm": "rms", "positions": "rotary", "tie_embeddings": False},
    attention=AttentionConfig(latent=LATENT),
)
MOE = MoEConfig(
    **{"num_experts": EXPERTS, "top_k": 2, "every": 2, "ffn": 14, "dispatch": "dropless", "shortcut": "pos2"},
    router=RouterConfig(gates="raw", gate_scale=3.0),
    shared=SharedConfig(1, ffn=20),
)


def peer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LongcatFlashForCausalLM(
        transformers.LongcatFlashConfig(
            vocab_size=MODEL.vocab_size,
            hidden_size=HIDDEN,
            num_layers=PAIRS,
            num_attention_heads=HEADS,
            ffn_hidden_size=MODEL.ffn,
            q_lora_rank=HIDDEN,
            kv_lora_rank=HIDDEN,
            qk_nope_head_dim=LATENT.nope_dim,
            qk_rope_head_dim=LATENT.rope_dim,
            head_dim=LATENT.rope_dim,
            v_head_dim=LATENT.v_dim,
            moe_topk=MOE.top_k,
            n_routed_experts=EXPERTS,
            zero_expert_num=0,
            expert_ffn_hidden_size=MOE.ffn,
            routed_scaling_factor=MOE.router.gate_scale,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            initializer_range=0.3,
            use_cache=False,
            attn_implementation="eager",
        )
    )


def rules() -> Iterator[Rule]:
    """What each of our parameters is made of, but for the experts' matrices."""
    yield Rule("embedding.weight", ("model.embed_tokens.weight",))
    yield Rule("norm.weight", ("model.norm.weight",))
    yield Rule("output.weight", ("lm_head.weight",))
    for block in range(2 * PAIRS):
        ours, theirs, half = f"blocks.{block}.", f"model.layers.{block // 2}.", block % 2
        yield Rule(f"{ours}norm1.weight", (f"{theirs}input_layernorm.{half}.weight",))
        yield Rule(f"{ours}norm2.weight", (f"{theirs}post_attention_layernorm.{half}.weight",))
        yield from DeepSeekV3().attention(MODEL, f"{ours}attention.", f"{theirs}self_attn.{half}.")
        inner = f"{ours}feed_forward." + ("shared." if half else "")
        yield from feed_forward(inner, f"{theirs}mlps.{half}.")
        if half:
            yield Rule(f"{ours}feed_forward.router.weight", (f"{theirs}mlp.router.classifier.weight",))


def translated(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their weights or gradients, by our names."""
    found = {rule.ours: rule.transform.join([theirs[name] for name in rule.theirs]) for rule in rules()}
    for pair in range(PAIRS):
        ours, of_theirs = f"blocks.{2 * pair + 1}.feed_forward.experts.", f"model.layers.{pair}.mlp.experts."
        halves = theirs[f"{of_theirs}gate_up_proj"].chunk(2, 1)
        found[f"{ours}up"] = torch.stack(halves, 2).flatten(1, 2).mT  # feature by feature
        found[f"{ours}down"] = theirs[f"{of_theirs}down_proj"].mT
    return found


@pytest.fixture(scope="module")
def compared(single: Topology) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits and gradients by tedlab's names: ours and theirs."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        with SinglePrecisionIsDouble():  # makes the frequencies of rotary positions, too
            theirs = peer()
        ids = torch.randint(0, 40, (3, LENGTH), generator=torch.Generator().manual_seed(1))
        with SinglePrecisionIsDouble():
            their_logits = theirs(ids).logits
        nn.functional.cross_entropy(their_logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
        network = GPT(MODEL, MOE, single, seed=0)
        weights = translated(dict(theirs.named_parameters()))
        own: dict[str, Any] = dict(network.named_parameters())
        assert own.keys() == weights.keys()
        for name, parameter in own.items():
            with torch.no_grad():
                parameter.to_local().copy_(weights[name])
        logits = network(ids)[0]
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        mine = {name: p.grad.to_local() for name, p in own.items()}
        return {"logits": logits.detach(), **mine}, {"logits": their_logits.detach(), **translated(gradients)}
    finally:
        torch.set_default_dtype(default)


def test_logits_and_every_gradient_are_those_of_longcat_flash(
    compared: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> None:
    ours, theirs = compared
    assert ours.keys() == theirs.keys()
    assert ours["logits"].dtype == theirs["logits"].dtype == torch.float64
    assert all(value.abs().max() > 0 for value in theirs.values())
    wrong = {name: relative_error(ours[name], theirs[name]) for name in ours}
    assert max(wrong.values()) < 1e-10, wrong
