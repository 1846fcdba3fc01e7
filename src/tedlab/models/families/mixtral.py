"""Mixtral (Jiang et al., 2024): experts in every block."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from tedlab.config import ModelConfig, MoEConfig
from tedlab.models.families.family import REQUIRED, Family, each_expert
from tedlab.models.families.llama import ALWAYS, DECODER, ONLY
from tedlab.models.families.mapping import Rule

EXPERTS: Mapping[str, Any] = {"moe.every": 1, "moe.dispatch": "dropless"}


class Mixtral(Family):
    """Mixtral 8x7B and 8x22B."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        **DECODER,
        "num_key_value_heads": ("model.kv_heads", 8),
        "rms_norm_eps": ("model.norm_eps", 1e-5),
        "intermediate_size": ("model.ffn", REQUIRED),
        "num_local_experts": ("moe.num_experts", 8),
        "num_experts_per_tok": ("moe.top_k", 2),
        "sliding_window": ("model.attention.window", None),
    }
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {**ONLY, "router_jitter_noise": (0.0,)}
    always: ClassVar[Mapping[str, Any]] = {**ALWAYS, **EXPERTS, "moe.router.gates": "normalized"}
    rope_theta = 1_000_000.0

    def write_further(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        return {"intermediate_size": moe.ffn or model.ffn}

    def experts(self, model: ModelConfig, moe: MoEConfig, ours: str, theirs: str) -> Iterator[Rule]:
        yield Rule(f"{ours}router.weight", (f"{theirs}block_sparse_moe.gate.weight",))
        yield from each_expert(moe, f"{ours}experts.", f"{theirs}block_sparse_moe.experts.", ("w1", "w3", "w2"))
