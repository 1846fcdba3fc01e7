"""Attention of published families is transformers': the same outputs and gradients in float64 for the same weights."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tedlab import Topology
from tedlab.certify.compare import relative_error
from tedlab.config import AttentionConfig, LatentConfig, ModelConfig, RotaryConfig
from tedlab.models import BlockSpec
from tedlab.nn import LatentAttention, LatentAttentionSpec, SelfAttention, rotation
from tests.test_transformers import SinglePrecisionIsDouble

pytestmark = pytest.mark.slow  # importing transformers alone takes some seconds

LENGTH, HIDDEN = 11, 24
PLAIN = ModelConfig(
    *(2, HIDDEN, 6, 20, LENGTH), activation="swiglu", bias=False, norm="rms", positions="rotary", norm_eps=1e-5
)
YARN = RotaryConfig("yarn", factor=4.0, original_length=8, beta_fast=8.0, beta_slow=1.0)
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A family's layer.

    Attributes:
        model: ours.
        family: theirs, a module and the beginning of its classes' names.
        options: of their configuration.
        named: Their weights, or gradients, by our names.
        block: which.
    """

    model: ModelConfig
    family: tuple[str, str]
    options: dict[str, Any]
    named: Callable[["Layer", Tensors], Tensors]
    block: int = 0


def of_heads(layer: Layer, theirs: Tensors) -> Tensors:
    model = layer.model
    kinds = ["weight"] + ["bias"] * ("q_proj.bias" in theirs)
    ours = {f"out.{kind}": theirs[f"o_proj.{kind}"] for kind in kinds}
    for kind in kinds:
        heads = model.kv_heads or model.heads
        q, k, v = (theirs[f"{part}_proj.{kind}"].unflatten(0, (heads, -1)) for part in "qkv")
        if model.kv_heads is None:
            ours[f"qkv.{kind}"] = torch.cat((q, k, v), 1).flatten(0, 1)
        else:
            ours[f"q.{kind}"], ours[f"kv.{kind}"] = q.flatten(0, 1), torch.cat((k, v), 1).flatten(0, 1)
    return ours | {name: theirs[name] for name in ("q_norm.weight", "k_norm.weight", "sinks") if name in theirs}


def of_latents(layer: Layer, theirs: Tensors) -> Tensors:
    latent = layer.model.attention.latent

    def halves(weight: Tensor, heads: int) -> Tensor:
        """Rows of rotated features, the last of each head, as pairs of halves and not of neighbours."""
        own, turned = weight.unflatten(0, (heads, -1)).tensor_split([-latent.rope_dim], 1)
        return torch.cat((own, turned[:, ::2], turned[:, 1::2]), 1).flatten(0, 1)

    names = {
        "q_proj.weight": "q.weight",
        "q_a_proj.weight": "q_down.weight",
        "q_a_proj.bias": "q_down.bias",
        "q_a_layernorm.weight": "q_norm.weight",
        "q_b_proj.weight": "q_up.weight",
        "kv_a_proj_with_mqa.weight": "kv_down.weight",
        "kv_a_proj_with_mqa.bias": "kv_down.bias",
        "kv_a_layernorm.weight": "kv_norm.weight",
        "kv_b_proj.weight": "kv_up.weight",
        "o_proj.weight": "out.weight",
        "o_proj.bias": "out.bias",
    }
    heads = {"q.weight": 6, "q_up.weight": 6, "kv_down.weight": 1, "kv_down.bias": 1}
    ours = {names[name]: value for name, value in theirs.items()}
    return {name: halves(value, heads[name]) if name in heads else value for name, value in ours.items()}


def their_yarn(**further: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0},
            **{"original_max_position_embeddings": 8, **further},
        }
    }


LATENT = LatentConfig(kv_rank=10, q_rank=14, nope_dim=6, rope_dim=8, v_dim=5)
THEIR_LATENT = {"kv_lora_rank": 10, "q_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5}
SCALED = {"mscale": 0.707, "mscale_all_dim": 0.9}
GPT_OSS = replace(
    PLAIN,
    kv_heads=2,
    head_dim=8,
    rotary=replace(YARN, truncate=False),
    attention=AttentionConfig(qkv_bias=True, out_bias=True, window=4, full_every=2, sinks=True),
)
THEIR_GPT_OSS = {"head_dim": 8, "attention_bias": True, "sliding_window": 4, **their_yarn(truncate=False)}
LAYERS = {
    "OLMoE": Layer(replace(PLAIN, qk_norm="full"), ("olmoe", "Olmoe"), {"num_key_value_heads": 6}, of_heads),
    "OLMoE, shared keys": Layer(
        replace(PLAIN, qk_norm="full", kv_heads=3), ("olmoe", "Olmoe"), {"num_key_value_heads": 3}, of_heads
    ),
    "Qwen3": Layer(
        replace(PLAIN, qk_norm="head", kv_heads=2, head_dim=8), ("qwen3_moe", "Qwen3Moe"), {"head_dim": 8}, of_heads
    ),
    "Mixtral": Layer(
        replace(PLAIN, kv_heads=2, attention=AttentionConfig(window=3)),
        ("mixtral", "Mixtral"),
        {"sliding_window": 3},
        of_heads,
    ),
    "gpt-oss, sliding": Layer(GPT_OSS, ("gpt_oss", "GptOss"), THEIR_GPT_OSS, of_heads),
    "gpt-oss, full": Layer(GPT_OSS, ("gpt_oss", "GptOss"), THEIR_GPT_OSS, of_heads, block=1),
    "DeepSeek-V2": Layer(
        replace(
            *(PLAIN,),
            attention=AttentionConfig(latent=replace(LATENT, q_rank=None)),
            rotary=replace(YARN, **SCALED),
        ),
        ("deepseek_v2", "DeepseekV2"),
        {**THEIR_LATENT, "q_lora_rank": None, "num_key_value_heads": 6, **their_yarn(**SCALED)},
        of_latents,
    ),
    "DeepSeek-V3": Layer(
        replace(PLAIN, attention=AttentionConfig(qkv_bias=True, out_bias=True, latent=LATENT)),
        ("deepseek_v3", "DeepseekV3"),
        {**THEIR_LATENT, "num_key_value_heads": 6, "attention_bias": True},
        of_latents,
    ),
}


def of_theirs(layer: Layer, x: Tensor, direction: Tensor, draw: torch.Generator) -> tuple[Tensors, Tensors, Tensor]:
    """Weights and gradients by our names, of the input too, and the output."""
    package, prefix = layer.family
    at = f"transformers.models.{package}"
    modeling = importlib.import_module(f"{at}.modeling_{package}")
    masks = importlib.import_module("transformers.masking_utils")
    config = getattr(importlib.import_module(f"{at}.configuration_{package}"), f"{prefix}Config")(
        **{"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2}
        | {"max_position_embeddings": 32, "rms_norm_eps": 1e-5, "attention_dropout": 0.0}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
        | layer.options
    )
    config._attn_implementation = "eager"
    theirs: nn.Module = getattr(modeling, f"{prefix}Attention")(config, layer.block).double()
    for parameter in theirs.parameters():
        parameter.data.normal_(0.2, 0.5, generator=draw)
    x = x.clone().requires_grad_()
    positions = torch.arange(LENGTH).unsqueeze(0)
    sliding = getattr(config, "sliding_window", None) and not layer.block
    make = masks.create_sliding_window_causal_mask if sliding else masks.create_causal_mask
    mask = make(config, x, None, None, position_ids=positions)
    turns = getattr(modeling, f"{prefix}RotaryEmbedding")(config)(x, positions)
    y = theirs(x, position_embeddings=turns, attention_mask=mask)[0]
    y.backward(direction)
    assert x.grad is not None
    weights = {name: p.detach() for name, p in theirs.named_parameters()}
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    return layer.named(layer, weights), layer.named(layer, gradients) | {"input": x.grad}, y.detach()


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_transformers(name: str, single: Topology) -> None:
    pytest.importorskip("transformers")
    layer, draw = LAYERS[name], torch.Generator().manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        x, direction = (torch.randn(2, LENGTH, HIDDEN, generator=draw) for _ in "xy")
        with SinglePrecisionIsDouble():
            weights, gradients, expected = of_theirs(layer, x, direction, draw)
        model = layer.model
        spec = BlockSpec(model, None, model.attention.window_of(layer.block)).attention
        ours = LatentAttention(spec, single) if isinstance(spec, LatentAttentionSpec) else SelfAttention(spec, single)
        own: dict[str, Any] = dict(ours.named_parameters())
        assert own.keys() == weights.keys()
        for weight, value in weights.items():
            own[weight].detach().to_local().copy_(value)
        x.requires_grad_()
        y = ours(x, rotation(LENGTH, spec.rotary_dim, model.rotary_base, x.device, x.dtype, model.rotary))
        y.backward(direction)
    finally:
        torch.set_default_dtype(default)
    found = {weight: p.grad.to_local() for weight, p in own.items()} | {"input": x.grad}
    assert relative_error(y.detach(), expected) < 1e-12
    assert all(value.abs().max() > 0 for value in gradients.values())
    wrong = {weight: relative_error(found[weight], value) for weight, value in gradients.items()}
    assert max(wrong.values()) < 1e-11, wrong
