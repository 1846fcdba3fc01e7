"""OLMoE (Muennighoff et al., 2024): norms of all heads' queries, and keys, together."""

from collections.abc import Mapping
from typing import Any, ClassVar

from tedlab.config import ModelConfig, MoEConfig
from tedlab.models.families.family import REQUIRED
from tedlab.models.families.llama import ALWAYS, DECODER, ONLY, Biased
from tedlab.models.families.mixtral import EXPERTS


class OLMoE(Biased):
    """OLMoE 1B-7B."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        **DECODER,
        "rms_norm_eps": ("model.norm_eps", 1e-5),
        "intermediate_size": ("model.ffn", REQUIRED),
        "num_experts": ("moe.num_experts", 64),
        "num_experts_per_tok": ("moe.top_k", 8),
    }
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {**ONLY, "clip_qkv": (None,)}
    always: ClassVar[Mapping[str, Any]] = {**ALWAYS, **EXPERTS, "model.qk_norm": "full"}
    aliases: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}

    def read_further(self, left: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        gates = "normalized" if left.pop("norm_topk_prob", False) else "raw"
        return super().read_further(left, values) | {"moe.router.gates": gates}

    def write_further(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        return super().write_further(model, moe) | {
            "norm_topk_prob": moe.router.gates == "normalized",
            "intermediate_size": moe.ffn or model.ffn,
        }
