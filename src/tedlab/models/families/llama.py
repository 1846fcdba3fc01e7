"""Llama (Touvron et al., 2023), dense, and what most families after it share with it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from tedlab.config import ModelConfig, MoEConfig
from tedlab.models.families.family import REQUIRED, Family, attention_biases

DECODER: Mapping[str, tuple[str, Any]] = {
    "vocab_size": ("model.vocab_size", REQUIRED),
    "hidden_size": ("model.hidden", REQUIRED),
    "num_hidden_layers": ("model.layers", REQUIRED),
    "num_attention_heads": ("model.heads", REQUIRED),
    "num_key_value_heads": ("model.kv_heads", None),
    "head_dim": ("model.head_dim", None),
    "max_position_embeddings": ("model.sequence_length", REQUIRED),
    "rms_norm_eps": ("model.norm_eps", 1e-6),
    "tie_word_embeddings": ("model.tie_embeddings", False),
}
ALWAYS: Mapping[str, Any] = {
    "model.activation": "swiglu",
    "model.bias": False,
    "model.norm": "rms",
    "model.positions": "rotary",
}
ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
}


class Biased(Family):
    """Base of families in which ``attention_bias`` says whether all of attention's projections have biases."""

    def read_further(self, left: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        bias = left.pop("attention_bias", False)
        return {"model.attention.qkv_bias": bias, "model.attention.out_bias": bias}

    def write_further(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        return {"attention_bias": attention_biases(model)[0]}


class Llama(Biased):
    """Llama 1, 2 and 3."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        **DECODER,
        "intermediate_size": ("model.ffn", REQUIRED),
        "mlp_bias": ("model.bias", False),
    }
    only = ONLY
    always = ALWAYS
