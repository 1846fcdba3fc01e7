"""DeepSeek-V2 and -V3 (2024): latent attention, dense first blocks, shared experts, choices within groups of experts.

Their rotary pairs are neighbours, ours half of a head's turning features apart, so rows of projections are permuted.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from tedlab.config import ModelConfig, MoEConfig
from tedlab.models.families.family import REQUIRED, each_expert, feed_forward
from tedlab.models.families.llama import ALWAYS, DECODER, Biased
from tedlab.models.families.mapping import PairsApart, Rule
from tedlab.models.families.mixtral import EXPERTS

_PREDICTED = 8  # the most blocks after the last that predict further tokens, which are no part of the model


class _DeepSeek(Biased):
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        **{name: field for name, field in DECODER.items() if name not in ("num_key_value_heads", "head_dim")},
        "intermediate_size": ("model.ffn", REQUIRED),
        "moe_intermediate_size": ("moe.ffn", REQUIRED),
        "n_routed_experts": ("moe.num_experts", REQUIRED),
        "n_shared_experts": ("moe.shared.experts", REQUIRED),
        "num_experts_per_tok": ("moe.top_k", REQUIRED),
        "first_k_dense_replace": ("moe.first_dense", 0),
        "routed_scaling_factor": ("moe.router.gate_scale", 1.0),
        "q_lora_rank": ("model.attention.latent.q_rank", 1536),
        "kv_lora_rank": ("model.attention.latent.kv_rank", REQUIRED),
        "qk_nope_head_dim": ("model.attention.latent.nope_dim", REQUIRED),
        "qk_rope_head_dim": ("model.attention.latent.rope_dim", REQUIRED),
        "v_head_dim": ("model.attention.latent.v_dim", REQUIRED),
    }
    always: ClassVar[Mapping[str, Any]] = {**ALWAYS, **EXPERTS}
    aliases: ClassVar[Mapping[str, str]] = {"num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"}
    # The last says how each kind of process divides experts; those before follow from others, or say how to train.
    meaningless = frozenset(
        {
            *("head_dim", "qk_head_dim", "num_nextn_predict_layers", "num_mtp_layers"),
            *("aux_loss_alpha", "seq_aux", "ep_size"),
        }
    )

    def read_further(self, left: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        heads = left.pop("num_key_value_heads", None)
        if heads not in (None, values["model.heads"]):
            left["num_key_value_heads"] = heads
        return super().read_further(left, values)

    def write_further(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        return super().write_further(model, moe) | {
            "num_key_value_heads": model.heads,
            "moe_intermediate_size": moe.ffn or model.ffn,
        }

    def left_out_of(self, model: ModelConfig) -> tuple[str, ...]:
        further = "|".join(map(str, range(model.layers, model.layers + _PREDICTED)))
        return (*super().left_out_of(model), rf"model\.layers\.({further})\..*")

    def attention(self, model: ModelConfig, ours: str, theirs: str) -> Iterator[Rule]:
        latent = model.attention.latent
        assert latent.kv_rank is not None
        of_queries, of_keys = PairsApart(model.heads, latent.nope_dim), PairsApart(1, latent.kv_rank)
        parts = ("weight", "bias") if model.attention.qkv_bias else ("weight",)
        if latent.q_rank is None:
            yield Rule(f"{ours}q.weight", (f"{theirs}q_proj.weight",), of_queries)
        else:
            for part in parts:
                yield Rule(f"{ours}q_down.{part}", (f"{theirs}q_a_proj.{part}",))
            yield Rule(f"{ours}q_norm.weight", (f"{theirs}q_a_layernorm.weight",))
            yield Rule(f"{ours}q_up.weight", (f"{theirs}q_b_proj.weight",), of_queries)
        for part in parts:
            yield Rule(f"{ours}kv_down.{part}", (f"{theirs}kv_a_proj_with_mqa.{part}",), of_keys)
        yield Rule(f"{ours}kv_norm.weight", (f"{theirs}kv_a_layernorm.weight",))
        yield Rule(f"{ours}kv_up.weight", (f"{theirs}kv_b_proj.weight",))
        for part in ("weight", "bias") if model.attention.out_bias else ("weight",):
            yield Rule(f"{ours}out.{part}", (f"{theirs}o_proj.{part}",))

    def experts(self, model: ModelConfig, moe: MoEConfig, ours: str, theirs: str) -> Iterator[Rule]:
        yield Rule(f"{ours}router.weight", (f"{theirs}mlp.gate.weight",))
        yield from each_expert(moe, f"{ours}experts.", f"{theirs}mlp.experts.", ("gate_proj", "up_proj", "down_proj"))
        yield from feed_forward(f"{ours}shared.", f"{theirs}mlp.shared_experts.")


class DeepSeekV2(_DeepSeek):
    """DeepSeek-V2 and V2-Lite."""

    model_type = "deepseek_v2"
    architecture = "DeepseekV2ForCausalLM"
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **{"hidden_act": ("silu",), "attention_dropout": (0.0,), "mlp_bias": (False,), "moe_layer_freq": (1,)},
        **{"norm_topk_prob": (False,), "scoring_func": ("softmax",)},
    }
    always: ClassVar[Mapping[str, Any]] = {**_DeepSeek.always, "moe.router.gates": "raw"}

    def read_further(self, left: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        method, groups, chosen = (left.pop(name, None) for name in ("topk_method", "n_group", "topk_group"))
        found = super().read_further(left, values)
        if method == "group_limited_greedy":
            found |= {"moe.router.expert_groups": groups, "moe.router.chosen_groups": chosen}
        elif method not in (None, "greedy"):
            left["topk_method"] = method
        return found

    def write_further(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        router = moe.router
        return super().write_further(model, moe) | {
            "topk_method": "greedy" if router.expert_groups == 1 else "group_limited_greedy",
            "n_group": router.expert_groups,
            "topk_group": router.chosen_groups,
        }


class DeepSeekV3(_DeepSeek):
    """DeepSeek-V3, R1 and Moonlight, in bfloat16."""

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        **_DeepSeek.fields,
        "first_k_dense_replace": ("moe.first_dense", 3),
        "routed_scaling_factor": ("moe.router.gate_scale", 2.5),
        "n_group": ("moe.router.expert_groups", 8),
        "topk_group": ("moe.router.chosen_groups", 4),
    }
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **{"hidden_act": ("silu",), "attention_dropout": (0.0,), "moe_layer_freq": (1,), "rope_interleave": (True,)},
        **{"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    }
    always: ClassVar[Mapping[str, Any]] = {
        **_DeepSeek.always,
        **{"moe.router.scoring": "sigmoid", "moe.router.group_score": "top2", "moe.router.bias_update": "sign"},
    }

    def read_further(self, left: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        gates = "normalized" if left.pop("norm_topk_prob", True) else "raw"
        return super().read_further(left, values) | {"moe.router.gates": gates}

    def write_further(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        gates = {"norm_topk_prob": moe.router.gates == "normalized"}
        return super().write_further(model, moe) | gates

    def experts(self, model: ModelConfig, moe: MoEConfig, ours: str, theirs: str) -> Iterator[Rule]:
        yield from super().experts(model, moe, ours, theirs)
        yield Rule(f"{ours}router.bias", (f"{theirs}mlp.gate.e_score_correction_bias",))
