"""Qwen3 (Yang et al., 2025), dense and with experts: norms of each head's queries and keys."""

from collections.abc import Mapping
from typing import Any, ClassVar

from tedlab.config import ModelConfig, MoEConfig
from tedlab.models.families.family import REQUIRED
from tedlab.models.families.llama import ALWAYS, DECODER, ONLY, Biased
from tedlab.models.families.mixtral import EXPERTS

_DECODER: Mapping[str, tuple[str, Any]] = {**DECODER, "head_dim": ("model.head_dim", 128)}
_ALWAYS: Mapping[str, Any] = {**ALWAYS, "model.qk_norm": "head"}
_NO_WINDOW = frozenset({"sliding_window", "max_window_layers"})  # without use_sliding_window


class Qwen3(Biased):
    """Qwen3 0.6B to 32B."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        **_DECODER,
        "num_key_value_heads": ("model.kv_heads", 32),
        "intermediate_size": ("model.ffn", REQUIRED),
    }
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {**ONLY, "use_sliding_window": (False,)}
    always = _ALWAYS
    meaningless = _NO_WINDOW

    def read_further(self, left: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        if set(left.get("layer_types") or ()) <= {"full_attention"}:
            left.pop("layer_types", None)
        return super().read_further(left, values)


class Qwen3MoE(Biased):
    """Qwen3 30B-A3B and 235B-A22B."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        **_DECODER,
        "num_key_value_heads": ("model.kv_heads", 4),
        "intermediate_size": ("model.ffn", REQUIRED),
        "moe_intermediate_size": ("moe.ffn", REQUIRED),
        "num_experts": ("moe.num_experts", REQUIRED),
        "num_experts_per_tok": ("moe.top_k", REQUIRED),
    }
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {**ONLY, "use_sliding_window": (False,)}
    always: ClassVar[Mapping[str, Any]] = {**_ALWAYS, **EXPERTS}
    aliases: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}
    meaningless: ClassVar[frozenset[str]] = _NO_WINDOW

    def read_further(self, left: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        found = super().read_further(left, values)
        found["moe.router.gates"] = "normalized" if left.pop("norm_topk_prob", False) else "raw"
        every, dense = left.pop("decoder_sparse_step", 1), left.pop("mlp_only_layers", None)
        found["moe.every"] = every
        if dense:
            routed = range(every - 1, values["model.layers"], every)
            found["moe.blocks"] = [index for index in routed if index not in dense]
        return found

    def write_further(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        routed = moe.routed(model.layers)
        return super().write_further(model, moe) | {
            "norm_topk_prob": moe.router.gates == "normalized",
            "moe_intermediate_size": moe.ffn or model.ffn,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [index for index in range(model.layers) if index not in routed],
        }
