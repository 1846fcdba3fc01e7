"""The ``config.json`` of published models is read whole, and says a model of as many parameters as were published."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tedlab.exchange.folder import CONFIG
from tedlab.exchange.imports import described
from tedlab.models import GPTSpec
from tedlab.models.families import FAMILIES, essence, family_for
from tests.exchange.families import CONFIGS
from tests.test_conf import compose

_COMMON: dict[str, Any] = {
    **{"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "use_cache": True},
    **{"initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.51.0"},
    **{"tie_word_embeddings": False, "rms_norm_eps": 1e-6},
}
_QWEN3 = {
    **{**_COMMON, "attention_bias": False, "head_dim": 128, "max_position_embeddings": 40_960, "rope_scaling": None},
    **{"rope_theta": 1_000_000, "use_sliding_window": False, "sliding_window": None, "vocab_size": 151_936},
}
_DEEPSEEK: dict[str, Any] = {
    **{**_COMMON, "attention_bias": False, "moe_layer_freq": 1, "max_position_embeddings": 163_840, "ep_size": 1},
    **{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_theta": 10_000},
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},  # code, which nobody runs
}
_YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        8_030_261_248,
        {
            **{**_COMMON, "model_type": "llama", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
            **{"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 131_072},
            **{"rms_norm_eps": 1e-5, "rope_theta": 500_000.0},
            "rope_scaling": {
                **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"},
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            **{**_QWEN3, "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072},
            **{"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
            **{"max_window_layers": 28, "tie_word_embeddings": True},
        },
    ),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        {
            **{**_QWEN3, "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144},
            **{"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "max_window_layers": 48},
            **{"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True},
            **{"num_experts": 128, "num_experts_per_tok": 8, "router_aux_loss_coef": 0.001},
            "output_router_logits": False,
        },
    ),
    "Mixtral-8x7B": (
        46_702_792_704,
        {
            **{**_COMMON, "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14_336},
            **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_000},
            **{"max_position_embeddings": 32_768, "num_local_experts": 8, "num_experts_per_tok": 2},
            **{"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "router_aux_loss_coef": 0.02, "sliding_window": None},
            "output_router_logits": False,
        },
    ),
    "OLMoE-1B-7B": (
        6_919_161_856,
        {
            **{**_COMMON, "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "pad_token_id": 1},
            **{"num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50_304},
            **{"max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
            **{"rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "rope_scaling": None, "router_aux_loss_coef": 0.01},
            **{"attention_bias": False, "clip_qkv": None, "output_router_logits": False},
        },
    ),
    "DeepSeek-V2-Lite": (
        15_706_484_224,
        {
            **{**_DEEPSEEK, "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10_944},
            **{"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 102_400},
            **{"q_lora_rank": None, "first_k_dense_replace": 1, "moe_intermediate_size": 1408, "pretraining_tp": 1},
            **{"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "norm_topk_prob": False},
            **{"n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax"},
            **{"routed_scaling_factor": 1.0, "aux_loss_alpha": 0.001, "seq_aux": True},
            "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "DeepSeek-V3": (
        671_026_404_352,
        {
            **{**_DEEPSEEK, "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18_432},
            **{"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129_280},
            **{"q_lora_rank": 1536, "first_k_dense_replace": 3, "moe_intermediate_size": 2048},
            **{"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": True},
            **{"n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
            **{"routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1},
            "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "gpt-oss-20b": (
        20_914_757_184,
        {
            **{**_COMMON, "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64},
            **{"num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 201_088},
            **{"max_position_embeddings": 131_072, "num_local_experts": 32, "num_experts_per_tok": 4},
            **{"rms_norm_eps": 1e-5, "rope_theta": 150_000, "router_aux_loss_coef": 0.9, "sliding_window": 128},
            **{"attention_bias": True, "experts_per_token": 4, "initial_context_length": 4096, "swiglu_limit": 7.0},
            **{"layer_types": ["sliding_attention", "full_attention"] * 12, "output_router_logits": False},
            "rope_scaling": {
                **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False},
                "original_max_position_embeddings": 4096,
            },
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_says_the_published_model(name: str) -> None:
    parameters, config = PUBLISHED[name]
    family, model, moe = described(config, Path(name))
    assert sum(torch.Size(parameter.shape).numel() for parameter in GPTSpec(model, moe).parameters()) == parameters
    assert family_for(model, moe) is family
    again = described(family.write(model, moe), Path(name))[1:]
    assert essence(*again) == essence(model, moe)


PRESETS = {
    **{"Qwen3-30B-A3B": "qwen3_30b_a3b", "Mixtral-8x7B": "mixtral_8x7b", "OLMoE-1B-7B": "olmoe_1b_7b"},
    **{"DeepSeek-V2-Lite": "deepseek_v2_lite", "DeepSeek-V3": "deepseek_v3", "gpt-oss-20b": "gpt_oss_20b"},
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_the_published_configuration_says(name: str) -> None:
    config = compose(f"preset={PRESETS[name]}")
    _, model, moe = described(PUBLISHED[name][1], Path(name))
    theirs, ours = essence(model, moe), essence(config.model, config.moe)
    assert {key: ours[key] for key in theirs} == theirs
    assert ours.keys() == theirs.keys()


ODD: tuple[Any, ...] = (None, "x", -1, 0, 2.5, True, [], [7], {}, {"rope_type": []}, 1e300, float("nan"), 10**30)


@pytest.mark.parametrize("each", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_value_of_any_field_is_read_or_refused_in_a_sentence(name: str, each: bool) -> None:
    """Whoever publishes a folder may write anything into it."""
    config = {**CONFIGS[name], "model_type": name}
    known = {*config, *FAMILIES[name].fields, *FAMILIES[name].only, "rope_parameters", "rope_scaling", "layer_types"}
    for index, field in enumerate(sorted(known - {"model_type"}), 5 * list(FAMILIES).index(name)):
        for value in ODD if each else ODD[index % len(ODD) :][:1]:
            message = said({**config, field: value})
            assert message is None or message.startswith(f"there/{CONFIG}"), (field, value, message)
            assert message is None or len(message) < 400, (field, value, message)


def said(config: dict[str, Any]) -> str | None:
    """What is said of a ``config.json``; None if it is read."""
    try:
        described(config, Path("there"))
    except ValueError as error:
        return str(error)
    return None


def test_the_base_of_rotary_positions_is_read_at_both_places() -> None:
    """Releases 4 and 5 of transformers write it at different ones."""
    config = {name: value for name, value in CONFIGS["mixtral"].items() if name != "rope_theta"} | {
        "model_type": "mixtral"
    }
    for given in ({"rope_theta": 7e3}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}}):
        assert described({**config, **given}, Path("there"))[1].rotary_base == 7e3
    assert described(config, Path("there"))[1].rotary_base == 1e6
