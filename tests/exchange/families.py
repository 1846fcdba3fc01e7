"""Small random models of every family, as folders."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tedlab.exchange import folder
from tedlab.exchange.imports import shapes_of
from tedlab.models.families import FAMILIES, configured

_SIZES = {
    **{"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2},
    **{"head_dim": 8, "max_position_embeddings": 16, "tie_word_embeddings": False, "rope_theta": 5_000.0},
}
_EXPERTS = {"num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_LLAMA3 = {
    **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8,
}
_DEEPSEEK = {
    **{name: size for name, size in _SIZES.items() if name not in ("head_dim", "num_key_value_heads")},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 3, "first_k_dense_replace": 1},
    **{"intermediate_size": 28, "moe_intermediate_size": 12, "n_routed_experts": 4, "n_shared_experts": 2},
    **{"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10, "num_experts_per_tok": 2},
}
_DEEPSEEK_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "mscale": 0.7, "mscale_all_dim": 0.5}
# The fields of ``config.json``.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        **{**_SIZES, "num_key_value_heads": 6, "head_dim": 4, "intermediate_size": 20},
        **{"attention_bias": True, "mlp_bias": True, "rope_scaling": _LLAMA3},
    },
    "qwen3": {**_SIZES, "intermediate_size": 28, "tie_word_embeddings": True},
    "olmoe": {
        **{**_SIZES, **_EXPERTS, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6},
        **{"intermediate_size": 20, "num_experts": 4, "norm_topk_prob": False},
    },
    "mixtral": {**_SIZES, **_EXPERTS, "sliding_window": 5, "intermediate_size": 28, "num_local_experts": 4},
    "gpt_oss": {
        **{**_SIZES, **_EXPERTS, "intermediate_size": 20, "num_local_experts": 4, "sliding_window": 5},
        **{"layer_types": ["sliding_attention", "full_attention"], "swiglu_limit": 0.5, "attention_bias": True},
        **{"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, **_YARN}},
    },
    "deepseek_v2": {  # queries are not compressed, as in V2-Lite, but experts are in groups, as in V2
        **{**_DEEPSEEK, "q_lora_rank": None, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
        **{
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 4,
                **_DEEPSEEK_YARN,
            }
        },
    },
    "deepseek_v3": {
        **{**_DEEPSEEK, "q_lora_rank": 10, "n_group": 3, "topk_group": 2, "norm_topk_prob": True},
        **{"n_routed_experts": 6, "n_shared_experts": 1, "routed_scaling_factor": 2.5},
    },
    "qwen3_moe": {
        **{**_SIZES, **_EXPERTS, "num_experts": 5, "num_experts_per_tok": 3},
        **{
            "intermediate_size": 28,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "num_hidden_layers": 3,
            "mlp_only_layers": [0],
        },
    },
}


def draw(path: Path, name: str, config: Mapping[str, Any] | None = None, **others: Any) -> Path:
    """Writes a folder with a random model of a family, without transformers.

    Args:
        path: The folder, which must not exist.
        name: The family.
        config: Fields of its ``config.json``; None: those of ``CONFIGS``.
        others: Further arguments of :func:`tedlab.exchange.folder.write`.
    """
    family = FAMILIES[name]
    fields = {**(config or CONFIGS[name]), "model_type": name}
    model, moe = configured(family.read(fields))
    ours = shapes_of(model, moe)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for rule in family.rules(model, moe):
        whole = torch.empty(ours[rule.ours], device="meta")
        for theirs, part in zip(rule.theirs, rule.transform.split(rule.part(whole)), strict=True):
            shapes[theirs] = torch.float32, (whole.shape[0], *part.shape) if rule.sliced else tuple(part.shape)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for theirs, (_, shape) in shapes.items():
            yield theirs, torch.randn(shape, generator=generator) * 0.3

    path.mkdir()
    folder.write(path, fields, shapes, tensors(), **others)
    return path


def packed(path: Path, sizes: Mapping[str, Any]) -> Path:
    """Writes a folder with a random gpt-oss of these sizes, its experts in MXFP4, as it is published."""
    draw(path, "gpt_oss", {**CONFIGS["gpt_oss"], **sizes, "layer_types": None})
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(path / folder.SINGLE)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator).to(torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(115, 130, shape, generator=generator).to(torch.uint8)
    save_file(tensors, path / folder.SINGLE)
    config = json.loads((path / folder.CONFIG).read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / folder.CONFIG).write_text(json.dumps(config))
    return path
