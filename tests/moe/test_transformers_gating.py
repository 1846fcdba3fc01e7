"""The default router chooses and weights experts as transformers' routers of released models do, token by token.

Each family gets 1,024 random tokens for each of several numbers of experts, choices and groups, in float64. The
experts of a token are compared as a set, since transformers does not sort all of them, and weights by expert.
DeepSeek-V2's router gives 0 to experts outside of the chosen groups, which is as good as leaving them out: all scores
are positive. gpt-oss adds a learned bias to its logits.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tedlab import Topology
from tedlab.config import MoEConfig, RouterConfig
from tedlab.moe import Router, RouterSpec
from tedlab.nn import Init, initialize
from tests.test_transformers import SinglePrecisionIsDouble

pytestmark = pytest.mark.slow  # importing transformers alone takes some seconds

TOKENS, HIDDEN = 1024, 24
V2 = RouterConfig(gates="raw", gate_scale=16.0)
V3 = RouterConfig(scoring="sigmoid", gates="normalized", gate_scale=2.5, group_score="top2", bias_update="sign")
V3_WITHOUT_GROUPS = replace(V3, group_score="max")


class Case(NamedTuple):
    """One size of a family.

    Attributes:
        router: Class in transformers.
        ours: The router that should do the same.
        sizes: Experts, choices, groups, chosen groups.
        options: Further attributes of their configuration.
    """

    router: str
    ours: RouterConfig
    sizes: tuple[int, int, int, int]
    options: dict[str, Any]


def grouped(ours: RouterConfig, sizes: tuple[int, int, int, int]) -> RouterConfig:
    return replace(ours, expert_groups=sizes[2], chosen_groups=sizes[3])


PLAIN = [(8, 2, 1, 1), (64, 8, 1, 1), (128, 8, 1, 1), (6, 1, 1, 1), (5, 5, 1, 1)]
GROUPED = [(64, 6, 8, 3), (160, 6, 8, 3), (12, 3, 3, 2), (16, 4, 4, 1), (8, 8, 2, 2)]
V3_SIZES = [(256, 8, 8, 4), *GROUPED]
FAMILIES: dict[str, list[Case]] = {
    "olmoe": [
        *(Case("OlmoeTopKRouter", RouterConfig(gates="raw"), n, {"norm_topk_prob": False}) for n in PLAIN),
        *(Case("OlmoeTopKRouter", RouterConfig(gates="normalized"), n, {"norm_topk_prob": True}) for n in PLAIN),
    ],
    "mixtral": [Case("MixtralTopKRouter", RouterConfig(gates="normalized"), n, {}) for n in PLAIN],
    "qwen3_moe": [
        *(Case("Qwen3MoeTopKRouter", RouterConfig(gates="raw"), n, {"norm_topk_prob": False}) for n in PLAIN),
        *(Case("Qwen3MoeTopKRouter", RouterConfig(gates="normalized"), n, {"norm_topk_prob": True}) for n in PLAIN),
    ],
    "deepseek_v2": [
        *(Case("DeepseekV2TopkRouter", V2, n, {"topk_method": "greedy"}) for n in PLAIN),
        *(
            Case("DeepseekV2TopkRouter", grouped(V2, n), n, {"topk_method": "group_limited_greedy"})
            for n in [*PLAIN, *GROUPED]
        ),
    ],
    "deepseek_v3": [
        *(Case("DeepseekV3TopkRouter", grouped(V3, n), n, {"norm_topk_prob": True}) for n in V3_SIZES),
        *(
            Case("DeepseekV3TopkRouter", replace(grouped(V3, n), gates="raw"), n, {"norm_topk_prob": False})
            for n in V3_SIZES
        ),
    ],
    "gpt_oss": [Case("GptOssTopKRouter", RouterConfig(gates="softmax", bias=True), n, {}) for n in PLAIN],
}


def theirs(family: str, case: Case, x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor) -> tuple[Tensor, ...]:
    """Logits, and the weights and experts of each token's choices."""
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    experts, top_k, groups, chosen_groups = case.sizes
    scale = {"routed_scaling_factor": case.ours.gate_scale, "n_group": groups, "topk_group": chosen_groups}
    sizes = {"num_experts": experts, "num_local_experts": experts, "num_experts_per_tok": top_k}
    config = SimpleNamespace(hidden_size=HIDDEN, **sizes, **scale, **case.options)
    router = getattr(module, case.router)(config).double()
    with torch.no_grad():
        router.weight.copy_(weight_EH)
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias.copy_(bias_E)
        elif hasattr(router, "bias"):
            router.bias.copy_(bias_E)
        return tuple(router(x_TH))


def ours(topology: Topology, case: Case, x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and experts of each token's choices."""
    experts, top_k, *_ = case.sizes
    config = MoEConfig(num_experts=experts, top_k=top_k, capacity_factor=None, capacity_multiple=1, router=case.ours)
    router = Router(RouterSpec(HIDDEN, config, Init(std=1.0)), topology).double()
    initialize(router, 0)
    with torch.no_grad():
        router.get_parameter("weight").to_local().copy_(weight_EH)  # type: ignore[operator]
        if router.biased:
            router.bias.to_local().copy_(bias_E)
        if case.ours.bias:
            router.get_parameter("logit_bias").to_local().copy_(bias_E)  # type: ignore[operator]
        routing = router(x_TH)
    assert (routing.slot_TK >= 0).all()
    return routing.gate_TK, routing.slot_TK.div(router.capacity(len(x_TH)), rounding_mode="floor")


def by_expert(weights_TK: Tensor, experts_TK: Tensor) -> tuple[Tensor, Tensor]:
    order = experts_TK.argsort(-1)
    return weights_TK.gather(1, order), experts_TK.gather(1, order)


def drawn(number: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, a router's weight, and biases that float32 holds, as large as differences between scores."""
    draw = torch.Generator().manual_seed(number)
    x_TH = torch.randn(TOKENS, HIDDEN, generator=draw, dtype=torch.float64)
    weight_EH = torch.randn(experts, HIDDEN, generator=draw, dtype=torch.float64) / HIDDEN**0.5
    return x_TH, weight_EH, (0.3 * torch.randn(experts, generator=draw)).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_and_weights_are_those_of_transformers(single: Topology, family: str) -> None:
    pytest.importorskip("transformers")
    for number, case in enumerate(FAMILIES[family]):
        drawn_ones = drawn(number, case.sizes[0])
        with SinglePrecisionIsDouble():
            _, *rest = theirs(family, case, *drawn_ones)
        their_weights, their_experts = by_expert(*rest)
        our_weights, our_experts = by_expert(*ours(single, case, *drawn_ones))
        assert our_weights.dtype == their_weights.dtype == torch.float64
        assert torch.equal(our_experts, their_experts), case
        torch.testing.assert_close(our_weights, their_weights, rtol=1e-12, atol=0, msg=str(case))


def test_the_cases_are_such_that_every_option_matters(single: Topology) -> None:
    """Without groups, biases or the scale, or with another scoring, choices or weights are others."""
    case = FAMILIES["deepseek_v3"][0]
    x_TH, weight_EH, bias_E = drawn(0, case.sizes[0])
    weights, experts = by_expert(*ours(single, case, x_TH, weight_EH, bias_E))
    assert (weights - weights[:, :1]).abs().max() > 0.1
    others: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "groups": lambda: ours(single, case._replace(ours=V3_WITHOUT_GROUPS), x_TH, weight_EH, bias_E),
        "score": lambda: ours(
            single, case._replace(ours=replace(case.ours, group_score="max")), x_TH, weight_EH, bias_E
        ),
        "biases": lambda: ours(single, case, x_TH, weight_EH, 0 * bias_E),
        "scoring": lambda: ours(
            single, case._replace(ours=replace(case.ours, scoring="softmax")), x_TH, weight_EH, bias_E
        ),
    }
    for name, other in others.items():
        changed = (by_expert(*other())[1] != experts).any(1).double().mean().item()
        assert changed > 0.02, name


@pytest.mark.parametrize("padded", [False, True])
def test_the_balance_loss_of_all_choices_is_that_of_transformers(single: Topology, padded: bool) -> None:
    """But for their factor K: they add a token's choices up, where tedlab takes shares, so that balance is 1."""
    module = pytest.importorskip("transformers.models.olmoe.modeling_olmoe")
    for number, (experts, top_k, *_) in enumerate(PLAIN):
        x_TH, weight_EH, _ = drawn(number, experts)
        config = MoEConfig(num_experts=experts, top_k=top_k, capacity_factor=None, router=RouterConfig(gates="raw"))
        router = Router(RouterSpec(HIDDEN, config, Init(std=1.0)), single).double()
        with torch.no_grad():
            router.get_parameter("weight").to_local().copy_(weight_EH)  # type: ignore[operator]
            padding_T = torch.arange(TOKENS) % 16 >= 11 if padded else None
            found = router(x_TH, 16, padding_T).report.balance_loss
            mask = None if padding_T is None else (~padding_T).view(-1, 16).double()
            with SinglePrecisionIsDouble():
                expected = module.load_balancing_loss_func((x_TH @ weight_EH.T,), experts, top_k, mask)
        torch.testing.assert_close(top_k * found, expected, rtol=1e-12, atol=0)
