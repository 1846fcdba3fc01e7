"""A MoE layer is the sparse block of transformers' models: the same results and gradients in float64, weight by weight.

With shared experts, gated or not, the clamped SwiGLU and learned biases; on both token paths of one process. Layouts
are compared with one process in ``tests/certify``.
"""

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tedlab import Topology
from tedlab.certify.compare import relative_error
from tedlab.config import MoEConfig, RouterConfig, SharedConfig
from tedlab.moe import MoELayer, MoESpec
from tedlab.nn import FeedForwardSpec, Init
from tests.test_transformers import SinglePrecisionIsDouble

pytestmark = pytest.mark.slow  # importing transformers alone takes some seconds

BATCH, LENGTH, HIDDEN, FFN, EXPERTS, TOP_K = 3, 7, 12, 10, 8, 3
MOE = MoEConfig(EXPERTS, every=1, top_k=TOP_K, capacity_factor=None, capacity_multiple=1)
DEEPSEEK = {
    **{"hidden_size": HIDDEN, "moe_intermediate_size": FFN, "n_routed_experts": EXPERTS, "n_shared_experts": 2},
    **{"num_attention_heads": 4},
    **{"num_experts_per_tok": TOP_K, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
}
GROUPS = RouterConfig(expert_groups=4, chosen_groups=2, gate_scale=2.5)


@dataclass(frozen=True)
class Family:
    """A family's sparse block.

    Attributes:
        block: The name of its class, after that of the family.
        config: The name of its configuration's class.
        sizes: The configuration.
        moe: What should be the same here.
        activation: Of the experts.
    """

    block: str
    config: str
    sizes: dict[str, Any]
    moe: MoEConfig
    activation: str = "swiglu"


FAMILIES = {
    "deepseek_v2": Family(
        "DeepseekV2Moe",
        "DeepseekV2Config",
        {**DEEPSEEK, "topk_method": "group_limited_greedy"},
        replace(MOE, router=replace(GROUPS, gates="raw"), shared=SharedConfig(2)),
    ),
    "deepseek_v3": Family(
        "DeepseekV3MoE",
        "DeepseekV3Config",
        {**DEEPSEEK, "norm_topk_prob": True},
        replace(
            MOE,
            router=replace(GROUPS, scoring="sigmoid", gates="normalized", group_score="top2"),
            shared=SharedConfig(2),
        ),
    ),
    "qwen2_moe": Family(
        "Qwen2MoeSparseMoeBlock",
        "Qwen2MoeConfig",
        {
            **{"hidden_size": HIDDEN, "moe_intermediate_size": FFN, "shared_expert_intermediate_size": 14},
            **{"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "norm_topk_prob": False},
        },
        replace(MOE, router=RouterConfig(gates="raw"), shared=SharedConfig(1, ffn=14, combine="cg1")),
    ),
    "gpt_oss": Family(
        "GptOssMLP",
        "GptOssConfig",
        {
            **{"hidden_size": HIDDEN, "intermediate_size": FFN, "num_local_experts": EXPERTS},
            **{"num_experts_per_tok": TOP_K, "swiglu_limit": 1.5},
        },
        replace(MOE, router=RouterConfig(gates="softmax", bias=True)),
        "clamped_swiglu",
    ),
}


def pairs(gate: Tensor, linear: Tensor) -> Tensor:
    """Rows of two projections, feature by feature."""
    return torch.stack((gate, linear), -2).flatten(-3, -2)


def taken_over(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights, or gradients, by our names."""
    ours = {}
    for name, value in theirs.items():
        if name.endswith(("gate.weight", "router.weight")) and len(value) == EXPERTS:
            ours["router.weight"] = value
        elif name == "router.bias":
            ours["router.logit_bias"] = value
        elif name == "experts.gate_up_proj":  # gpt-oss has input features first, and alternates
            swapped = value.shape[1] == HIDDEN
            ours["experts.up"] = value if swapped else pairs(*value.chunk(2, 1)).mT
        elif name == "experts.down_proj":
            ours["experts.down"] = value if value.shape[2] == HIDDEN else value.mT
        elif name.endswith("_proj_bias"):
            side = "up" if "gate_up" in name else "down"
            ours[f"experts.{side}_bias"] = value.unsqueeze(1)
        elif name == "shared_expert_gate.weight":
            ours["shared.gate.weight"] = value
        elif name.endswith("down_proj.weight"):
            ours["shared.down.weight"] = value
        elif name.endswith("gate_proj.weight"):
            ours["shared.up.weight"] = pairs(value, theirs[name.replace("gate_proj", "up_proj")])
    return ours


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
@pytest.mark.parametrize("family", FAMILIES)
def test_results_and_gradients_are_those_of_transformers(single: Topology, family: str, dispatch: str) -> None:
    it = FAMILIES[family]
    transformers = pytest.importorskip("transformers")
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, LENGTH, HIDDEN, generator=draw, dtype=torch.float64)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with SinglePrecisionIsDouble():
            config = getattr(transformers, it.config)(**it.sizes, experts_implementation="eager")
            block: nn.Module = getattr(module, it.block)(config)
            for parameter in block.parameters():
                parameter.data.normal_(0.1, 0.6, generator=draw)
            their_x = x.clone().requires_grad_()
            their_y = block(their_x)
            their_y = their_y[0] if isinstance(their_y, tuple) else their_y
            direction = torch.randn(their_y.shape, generator=draw)
            (their_y * direction).sum().backward()
        bias, limit = family == "gpt_oss", it.sizes.get("swiglu_limit", 7.0)
        expert = FeedForwardSpec(HIDDEN, FFN, Init(), Init(), it.activation, bias, limit)
        layer = MoELayer(MoESpec(expert, replace(it.moe, dispatch=dispatch)), single)
    finally:
        torch.set_default_dtype(default)
    own: dict[str, Any] = dict(layer.named_parameters())
    weights = taken_over(dict(block.named_parameters()))
    assert weights.keys() == own.keys()
    for name, value in weights.items():
        own[name].detach().to_local().copy_(value.detach())
    our_x = x.clone().requires_grad_()
    y, _ = layer(our_x)
    (y * direction).sum().backward()
    assert relative_error(y.detach(), their_y.detach()) < 1e-13
    assert our_x.grad is not None
    assert their_x.grad is not None
    wrong = {"x": relative_error(our_x.grad, their_x.grad)}
    gradients = taken_over({name: p.grad for name, p in block.named_parameters() if p.grad is not None})
    assert gradients.keys() == own.keys()
    wrong |= {name: relative_error(own[name].grad.to_local(), value) for name, value in gradients.items()}
    assert max(wrong.values()) < 1e-12, wrong
    if family == "gpt_oss":  # the limit is one that some features reach, and most do not
        z = torch.einsum("bsh,ehz->bsez", x, weights["experts.up"].detach())
        assert 0.01 < (z.abs() > limit).double().mean() < 0.7
