"""gpt-oss (OpenAI, 2025): windows in every second block, sinks, a clamped SwiGLU, biases everywhere."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from tedlab.config import ModelConfig, MoEConfig
from tedlab.models.families.family import REQUIRED
from tedlab.models.families.llama import ALWAYS, DECODER, Biased
from tedlab.models.families.mapping import AsRow, Rule, Same
from tedlab.models.families.mixtral import EXPERTS

_FULL, _SLIDING = "full_attention", "sliding_attention"


class GptOss(Biased):
    """gpt-oss 20b and 120b, in bfloat16 or, as published, in MXFP4."""

    model_type = "gpt_oss"
    architecture = "GptOssForCausalLM"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        **DECODER,
        "head_dim": ("model.head_dim", 64),
        "num_key_value_heads": ("model.kv_heads", 8),
        "rms_norm_eps": ("model.norm_eps", 1e-5),
        "intermediate_size": ("model.ffn", REQUIRED),
        "num_local_experts": ("moe.num_experts", REQUIRED),
        "num_experts_per_tok": ("moe.top_k", 4),
        "swiglu_limit": ("model.swiglu_limit", 7.0),
    }
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "attention_dropout": (0.0,),
        "swiglu_alpha": (1.702,),
    }
    always: ClassVar[Mapping[str, Any]] = {
        **{**ALWAYS, **EXPERTS, "model.activation": "clamped_swiglu", "model.bias": True},
        **{"model.attention.sinks": True, "moe.router.bias": True, "moe.router.gates": "softmax"},
    }
    aliases: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}
    meaningless = frozenset(
        {"initial_context_length", "experts_per_token", "quantization_config"}
    )  # see `Folder`, other fields
    rope_theta = 150_000.0
    rope_scaling: ClassVar[Mapping[str, Any]] = {
        **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        "original_max_position_embeddings": 4096,
    }

    def read_further(self, left: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        left.setdefault("attention_bias", True)
        layers = values["model.layers"]
        types = left.pop("layer_types", None) or [(_SLIDING, _FULL)[index % 2] for index in range(layers)]
        window = left.pop("sliding_window", 128)
        found = super().read_further(left, values)
        full = [index for index in range(layers) if types[index : index + 1] == [_FULL]]
        if len(full) < layers:
            found["model.attention.window"] = window
        if full and len(full) < layers:
            found["model.attention.full_every"] = full[0] + 1
            if full != list(range(full[0], layers, full[0] + 1)):
                left["layer_types"] = types
        return found

    def write_further(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        attention = model.attention
        windows = [attention.window_of(index) for index in range(model.layers)]
        return super().write_further(model, moe) | {
            "intermediate_size": moe.ffn or model.ffn,
            "sliding_window": attention.window,
            "layer_types": [_FULL if window is None else _SLIDING for window in windows],
        }

    def experts(self, model: ModelConfig, moe: MoEConfig, ours: str, theirs: str) -> Iterator[Rule]:
        yield Rule(f"{ours}router.weight", (f"{theirs}mlp.router.weight",))
        yield Rule(f"{ours}router.logit_bias", (f"{theirs}mlp.router.bias",))
        for part, name in (("up", "gate_up_proj"), ("down", "down_proj")):
            for expert in range(moe.num_experts):
                yield Rule(f"{ours}experts.{part}", (f"{theirs}mlp.experts.{name}",), Same(), expert, sliced=True)
            for expert in range(moe.num_experts):
                bias = f"{theirs}mlp.experts.{name}_bias"
                yield Rule(f"{ours}experts.{part}_bias", (bias,), AsRow(), expert, sliced=True)
