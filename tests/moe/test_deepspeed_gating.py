"""DeepSpeed's gating: our index-based rules against DeepSpeed's own functions, and small cases worked out by hand."""

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tedlab import ParallelDegrees, Topology
from tedlab.capacity import deepspeed_capacity
from tedlab.config import DropPolicy, MoEConfig
from tedlab.moe import MoELayer, MoESpec, Router, RouterSpec, Routing
from tedlab.moe.balance import balance_loss
from tedlab.moe.deepspeed_gating import (
    GATINGS,
    DeepSpeedRouter,
    top1_gating,
    top2_gating,
    topk_gating,
)
from tedlab.moe.router import Decision
from tedlab.nn import FeedForwardSpec, Init, initialize
from tests.pool import WorkerPool
from tests.training import Job, Layout, Record, train


@pytest.fixture(scope="module")
def deepspeed() -> Any:
    """DeepSpeed's module of gating functions."""
    reason = "comparing with DeepSpeed needs the extra: pip install 'tedlab[deepspeed]'"
    pytest.importorskip("deepspeed", reason=reason)
    from deepspeed.moe import sharded_moe

    return sharded_moe


# ---- against DeepSpeed's own functions ---------------------------------------------------------------------------


class Cell(NamedTuple):
    """One point of the matrix. ``factor=None``: drop_tokens is off."""

    tokens: int
    experts: int
    factor: float | None
    min_capacity: int


class Theirs(NamedTuple):
    """What DeepSpeed says, from its dense answer (with what can be differentiated) and its answer by indices."""

    loss: Tensor
    combine_TEC: Tensor
    dispatch_TEC: Tensor
    load_E: Tensor
    capacity: int
    expert_KT: Tensor  # -1: dropped
    location_KT: Tensor
    gate_KT: Tensor


class Rule(NamedTuple):
    """A gating with its options: ours on (logits, capacity, randomness), theirs on (module, logits, arguments)."""

    top_k: int
    ours: Callable[[Tensor, int, Tensor], Decision]
    theirs: Callable[..., Any]


def topk_rule(top_k: int, policy: str) -> Rule:
    return Rule(
        top_k,
        lambda logits, capacity, _: topk_gating(logits, top_k, capacity, policy),
        lambda ds, logits, *args, **kwargs: ds.topkgating(logits, top_k, *args, drop_policy=policy, **kwargs),
    )


RULES = {
    "top1": Rule(
        1,
        lambda logits, capacity, random_TE: top1_gating(logits, capacity, random_TE[:, 0].exp()),
        lambda ds, *args, **kwargs: ds.top1gating(*args, **kwargs),
    ),
    "top1_without_random_selection": Rule(
        1,
        lambda logits, capacity, _: top1_gating(logits, capacity, None),
        lambda ds, *args, **kwargs: ds.top1gating(*args, use_rts=False, **kwargs),
    ),
    "top2": Rule(
        2,
        lambda logits, capacity, random_TE: top2_gating(logits, capacity, random_TE),
        lambda ds, *args, **kwargs: ds.top2gating(*args, **kwargs),
    ),
    "top2_without_sampling": Rule(
        2,
        lambda logits, capacity, _: top2_gating(logits, capacity, None),
        lambda ds, *args, **kwargs: ds.top2gating(*args, top2_2nd_expert_sampling=False, **kwargs),
    ),
} | {f"top{k}_{policy}": topk_rule(k, policy) for k in (1, 2, 3) for policy in DropPolicy}

LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda noise_TE: noise_TE,
    "equal": lambda noise_TE: 0 * noise_TE,  # nothing but ties
    "rounded": lambda noise_TE: noise_TE.round(),  # some ties
    "crowded": lambda noise_TE: noise_TE + 3 * (torch.arange(noise_TE.shape[1]) == 1),  # most tokens to expert 1
    "starved": lambda noise_TE: noise_TE - 50 * (torch.arange(noise_TE.shape[1]) == 0),  # none to expert 0
    "sharp": lambda noise_TE: 40 * noise_TE,  # probabilities of nearly 1 and nearly 0
}
CELLS = [Cell(*c) for c in itertools.product((5, 16, 50), (4, 8), (0.3, 1.0, 1.2, 2.0, None), (0, 4))]
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}


def problem(cell: Cell, logits: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, what both sides use as randomness, and weights that make one number of the combination."""
    generator = torch.Generator().manual_seed(1000 * cell.tokens + cell.experts)
    shape = cell.tokens, cell.experts
    noise_TE, random_TE = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    weight_TE1 = torch.randn(*shape, 1, generator=generator, dtype=dtype)
    return LOGITS[logits](noise_TE).to(dtype), random_TE, weight_TE1


def ask_deepspeed(
    deepspeed: Any, monkeypatch: pytest.MonkeyPatch, rule: Rule, cell: Cell, logits_TE: Tensor, random_TE: Tensor
) -> Theirs:
    """Calls DeepSpeed's function with our numbers in place of its random ones."""
    device = logits_TE.device
    uniform_TE = random_TE[:, :1].exp().expand_as(random_TE)
    factor = 1.0 if cell.factor is None else cell.factor
    arguments = (factor, cell.min_capacity)
    with monkeypatch.context() as patch:
        patch.setitem(deepspeed.exp_selection_uniform_map, device, lambda shape: uniform_TE)
        patch.setitem(deepspeed.gumbel_map, device, lambda shape: random_TE)
        if logits_TE.dtype == torch.float64:
            # DeepSpeed turns its masks into fp32 with .float(), whatever the logits are.
            patch.setattr(Tensor, "float", Tensor.double)
        # It adds noise to its argument in place: clones.
        options = {"drop_tokens": cell.factor is not None}
        loss, combine_TEC, dispatch_TEC, _ = rule.theirs(deepspeed, logits_TE.clone(), *arguments, **options)
        _, capacity, _, expert_KT, location_KT, gate_KT, load_E = rule.theirs(
            deepspeed, logits_TE.detach().clone(), *arguments, **options, sparse_routes=True
        )
    return Theirs(loss, combine_TEC, dispatch_TEC, load_E, int(capacity), expert_KT, location_KT, gate_KT)


def dense(decision: Decision, experts: int, capacity: int) -> Tensor:
    """(T, E, C) combination weights, from indices."""
    tokens, slots = len(decision.slot_TK), experts * capacity
    kept_TK = decision.slot_TK >= 0
    zeros = torch.zeros(tokens, slots + 1, dtype=decision.gate_TK.dtype)
    where_TK = decision.slot_TK.masked_fill(~kept_TK, slots)
    return zeros.scatter_add(1, where_TK, decision.gate_TK)[:, :slots].view(tokens, experts, capacity)


def compare(
    deepspeed: Any, monkeypatch: pytest.MonkeyPatch, rule: Rule, cell: Cell, logits: str, dtype: torch.dtype
) -> Decision:
    """Asserts that one cell agrees."""
    values_TE, random_TE, weight_TE1 = problem(cell, logits, dtype)
    leaf = values_TE.clone().requires_grad_()
    theirs = ask_deepspeed(deepspeed, monkeypatch, rule, cell, leaf, random_TE)
    (their_gradient,) = torch.autograd.grad((theirs.combine_TEC * weight_TE1).sum() + theirs.loss, leaf)

    capacity = deepspeed_capacity(cell.tokens, cell.experts, rule.top_k, cell.factor, cell.min_capacity, 1)
    leaf = values_TE.clone().requires_grad_()
    decision = rule.ours(leaf, capacity, random_TE)
    combine_TEC = dense(decision, cell.experts, capacity)
    (gradient,) = torch.autograd.grad((combine_TEC * weight_TE1).sum() + loss_of(decision), leaf)

    assert torch.equal(leaf.detach(), values_TE), "our rule changed its argument"
    if cell.factor is None:  # DeepSpeed's buffer is as long as the largest load, ours as the number of tokens
        assert theirs.capacity == theirs.load_E.max()
        assert (combine_TEC[..., theirs.capacity :] == 0).all()
        combine_TEC = combine_TEC[..., : theirs.capacity]
    else:
        assert capacity == theirs.capacity
    slot_KT = torch.where(theirs.expert_KT < 0, -1, theirs.expert_KT * capacity + theirs.location_KT)
    assert torch.equal(decision.slot_TK, slot_KT.t().long())
    assert torch.equal(decision.load, theirs.load_E)
    assert torch.equal(combine_TEC != 0, theirs.dispatch_TEC)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(decision.gate_TK.t(), theirs.gate_KT, **close)
    torch.testing.assert_close(combine_TEC, theirs.combine_TEC, **close)
    torch.testing.assert_close(loss_of(decision), theirs.loss, **close)
    torch.testing.assert_close(gradient, their_gradient, **close)
    return decision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("rule", RULES)
def test_decisions_losses_and_gradients_are_deepspeeds(
    deepspeed: Any, monkeypatch: pytest.MonkeyPatch, rule: str, logits: str, dtype: torch.dtype
) -> None:
    for cell in CELLS:
        try:
            compare(deepspeed, monkeypatch, RULES[rule], cell, logits, dtype)
        except AssertionError as error:
            raise AssertionError(f"{cell}: {error}") from error


def test_the_cells_drop_some_keep_all_and_leave_experts_empty() -> None:
    """Otherwise the comparison above would prove little. Runs without DeepSpeed."""
    dropped, complete, empty, lost = 0, 0, 0, 0
    for (rule, logits), cell in itertools.product(itertools.product(RULES.values(), LOGITS), CELLS):
        values_TE, random_TE, _ = problem(cell, logits, torch.float32)
        capacity = deepspeed_capacity(cell.tokens, cell.experts, rule.top_k, cell.factor, cell.min_capacity, 1)
        decision = rule.ours(values_TE, capacity, random_TE)
        kept_TK = decision.slot_TK >= 0
        dropped += int(not kept_TK.all())
        complete += int(kept_TK.all())
        empty += int((decision.load == 0).any())
        lost += int((~kept_TK).all(1).any())
        assert cell.factor is not None or kept_TK.all()
    assert min(dropped, complete, empty, lost) > 500, (dropped, complete, empty, lost)


def test_capacities_are_deepspeeds(deepspeed: Any) -> None:
    factors = (0.1, 0.5, 0.9, 1.0, 1.05, 1.1, 1.2, 1.25, 1.3, 2.0)
    unlike_exact = 0
    for tokens, experts, factor, k, least in itertools.product(
        (1, 4, 10, 25, 35, 64, 70, 100, 125, 2048), (1, 2, 3, 4, 16), factors, (1, 2, 3), (0, 4)
    ):
        theirs = deepspeed._capacity(torch.empty(tokens, experts), torch.tensor(factor * k), torch.tensor(least))
        assert deepspeed_capacity(tokens, experts, k, factor, least, 1) == theirs, (tokens, experts, factor, k)
        unlike_exact += int(theirs > max(math.ceil(round(tokens / experts * factor * k, 9)), least))
    assert unlike_exact > 10  # the fp32 product matters


# ---- by hand -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "factor", "least", "multiple", "capacity"),
    [
        (64, 4, 1, 1.0, 4, 1, 16),
        (64, 4, 2, 1.25, 4, 1, 40),
        (65, 4, 1, 1.0, 4, 1, 17),
        (8, 4, 1, 1.0, 4, 1, 4),  # two would do, but four is the least
        (8, 4, 1, 1.0, 0, 1, 2),
        (100, 4, 1, 1.2, 4, 1, 31),  # 25 · 1.2 is a little more than 30 in fp32
        (100, 4, 1, 1.2, 4, 8, 32),  # rounded up last
        (8, 4, 1, 1.0, 4, 8, 8),
        (40, 4, 2, None, 4, 1, 40),
        (41, 4, 2, None, 4, 8, 48),
        (2, 4, 1, None, 4, 1, 2),  # the least is for a capacity that drops
    ],
)
def test_capacity(
    tokens: int, experts: int, top_k: int, factor: float | None, least: int, multiple: int, capacity: int
) -> None:
    assert deepspeed_capacity(tokens, experts, top_k, factor, least, multiple) == capacity


def loss_of(decision: Decision) -> Tensor:
    assert decision.counted_TE is not None
    return balance_loss(decision.counted_TE.to(decision.probs_TE.dtype).mean(0), decision.probs_TE.mean(0))


def logits_of(*probabilities: tuple[float, ...]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def gates(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_top1_keeps_a_random_selection_in_order_of_the_tokens_with_its_probabilities() -> None:
    logits_TE = logits_of((0.9, 0.1), (0.6, 0.4), (0.8, 0.2), (0.7, 0.3), (0.4, 0.6))
    decision = top1_gating(logits_TE, 2, torch.tensor([3, 5, 1, 4, 2]))
    assert decision.slot_TK.tolist() == [[-1], [0], [-1], [1], [2]]  # not the first, not the most probable
    assert decision.choice_EC.tolist() == [1, 3, 4, -1]
    assert decision.load.tolist() == [4, 1]
    torch.testing.assert_close(decision.gate_TK, gates((0,), (0.6,), (0,), (0.7,), (0.6,)))
    assert loss_of(decision).item() == pytest.approx(2 * (4 / 5 * 3.4 / 5 + 1 / 5 * 1.6 / 5))


TWO_CHOICES = logits_of((0.6, 0.3, 0.1), (0.6, 0.1, 0.3), (0.1, 0.6, 0.3))


def test_top2_serves_first_choices_first_and_gives_the_gate_of_a_dropped_choice_to_the_other() -> None:
    decision = top2_gating(TWO_CHOICES, 1, None)
    # Expert 0: token 0, not token 1. Expert 1: token 2's first choice, not token 0's second. Expert 2: token 1.
    assert decision.slot_TK.tolist() == [[0, -1], [-1, 2], [1, -1]]
    assert decision.choice_EC.tolist() == [0, 4, 3]
    assert decision.load.tolist() == [2, 2, 2]
    torch.testing.assert_close(decision.gate_TK, gates((1, 0), (0, 1), (1, 0)))
    # Of first choices only: shares 2/3, 1/3, 0 and mean probabilities 1.3/3, 1/3, 0.7/3.
    assert loss_of(decision).item() == pytest.approx(3 * (2 / 3 * 1.3 / 3 + 1 / 3 * 1 / 3))

    ample = top2_gating(TWO_CHOICES, 2, None)
    assert ample.slot_TK.tolist() == [[0, 3], [1, 4], [2, 5]]
    torch.testing.assert_close(ample.gate_TK, gates(*[(2 / 3, 1 / 3)] * 3))


def test_a_token_that_loses_both_choices_has_no_gate() -> None:
    decision = top2_gating(logits_of((0.6, 0.4), (0.6, 0.4)), 1, None)
    assert decision.slot_TK.tolist() == [[0, 1], [-1, -1]]
    torch.testing.assert_close(decision.gate_TK, gates((0.6, 0.4), (0, 0)))


def test_noise_changes_the_second_expert_but_neither_the_first_nor_any_gate() -> None:
    noise_TE = torch.tensor([[9.0, 0.0, 3.0], [0.0, 9.0, 0.0], [0.0, 0.0, 0.0]])
    decision = top2_gating(TWO_CHOICES, 3, noise_TE)
    assert decision.slot_TK.div(3, rounding_mode="floor").tolist() == [[0, 2], [0, 1], [1, 2]]
    torch.testing.assert_close(decision.gate_TK, gates((6 / 7, 1 / 7), (6 / 7, 1 / 7), (2 / 3, 1 / 3)))
    torch.testing.assert_close(loss_of(decision), loss_of(top2_gating(TWO_CHOICES, 3, None)))


def test_topk_drops_by_probability_or_by_position() -> None:
    # Expert 0 is the second choice of token 0, the first one of tokens 1 and 2.
    logits_TE = logits_of((0.3, 0.5, 0.2), (0.5, 0.1, 0.4), (0.6, 0.15, 0.25))
    probs = topk_gating(logits_TE, 2, 2, "probs")
    assert probs.slot_TK.tolist() == [[2, -1], [0, 4], [1, 5]]  # 0.3 is the smallest
    torch.testing.assert_close(probs.gate_TK, gates((1, 0), (5 / 9, 4 / 9), (12 / 17, 5 / 17)))
    position = topk_gating(logits_TE, 2, 2, "position")
    assert position.slot_TK.tolist() == [[2, 0], [1, 4], [-1, 5]]  # a second choice may come before a first one
    torch.testing.assert_close(position.gate_TK, gates((5 / 8, 3 / 8), (5 / 9, 4 / 9), (0, 1)))
    for decision in (probs, position):
        assert decision.load.tolist() == [3, 1, 2]
        # Of all choices: per token 3/3, 1/3, 2/3, halved; mean probabilities 1.4/3, 0.75/3, 0.85/3.
        assert loss_of(decision).item() == pytest.approx(3 * (3 * 1.4 + 1 * 0.75 + 2 * 0.85) / 9 / 2)


def test_a_full_expert_compares_only_tokens_that_chose_it() -> None:
    # Token 0 likes expert 0 better than token 1 does, but has chosen expert 1.
    decision = topk_gating(logits_of((0.45, 0.55, 0.0), (0.4, 0.3, 0.3), (0.35, 0.33, 0.32)), 1, 1, "probs")
    assert decision.slot_TK.tolist() == [[1], [0], [-1]]


def test_topk_of_one_choice_has_gate_one() -> None:
    decision = topk_gating(logits_of((0.7, 0.3), (0.4, 0.6), (0.9, 0.1)), 1, 1, "probs")
    assert decision.slot_TK.tolist() == [[-1], [1], [0]]
    torch.testing.assert_close(decision.gate_TK, gates((0,), (1,), (1,)))


# ---- the router --------------------------------------------------------------------------------------------------

CONFIGS = {
    "top1": MoEConfig(num_experts=4, gating="deepspeed_top1"),
    "top2": MoEConfig(num_experts=4, top_k=2, gating="deepspeed_top2"),
    "topk": MoEConfig(num_experts=4, top_k=3, gating="deepspeed_topk"),
    "topk_position": MoEConfig(num_experts=4, top_k=3, gating="deepspeed_topk", drop_policy="position"),
}
SETTLED = {"random_token_selection": False, "second_expert_sampling": False}


def settled(config: MoEConfig) -> MoEConfig:
    """Without anything random, and with a capacity that drops."""
    return replace(config, capacity_factor=0.6, capacity_multiple=1, min_capacity=0, **SETTLED)


HIDDEN = 6
EXPERT = FeedForwardSpec(HIDDEN, 8, Init(std=0.5), Init(std=0.5))


def router_of(config: MoEConfig, topology: Topology) -> DeepSpeedRouter:
    router = DeepSpeedRouter(RouterSpec(HIDDEN, config, Init(std=1.0)), topology).double()
    initialize(router, 0)
    return router


def tokens_of(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 21])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_decision_has_the_shapes_and_types_that_token_paths_rely_on(
    single: Topology, name: str, count: int, dtype: torch.dtype
) -> None:
    config = replace(CONFIGS[name], capacity_factor=0.6)
    routing = router_of(config, single).to(dtype)(tokens_of(count).to(dtype))
    precise = torch.promote_types(dtype, torch.float32)
    capacity = deepspeed_capacity(count, 4, config.top_k, 0.6, 4, 8)
    shape = count, config.top_k
    assert (routing.gate_TK.shape, routing.gate_TK.dtype) == (shape, precise)
    assert (routing.slot_TK.shape, routing.slot_TK.dtype) == (shape, torch.int64)
    assert (routing.choice_EC.shape, routing.choice_EC.dtype) == ((4 * capacity,), torch.int64)
    assert routing.report.load.shape == (4,)
    assert routing.report.load.sum() == count * config.top_k
    assert routing.report.balance_loss.dtype == routing.report.z_loss.dtype == precise
    assert routing.report.dropped == (routing.slot_TK < 0).sum()
    slots = routing.slot_TK.flatten()
    kept = (slots >= 0).nonzero().flatten()
    assert torch.equal(routing.choice_EC[slots[kept]], kept)  # choice_EC is the inverse of slot_TK,
    assert (routing.choice_EC >= 0).sum() == len(kept)  # and holds nothing else


@pytest.mark.parametrize("name", CONFIGS)
def test_the_layer_builds_the_configured_router_and_trains_it(single: Topology, name: str) -> None:
    layer = MoELayer(MoESpec(EXPERT, settled(CONFIGS[name])), single).double()
    initialize(layer, 0)
    assert isinstance(layer.router, DeepSpeedRouter)
    y, report = layer(tokens_of(20).view(4, 5, HIDDEN))
    assert y.shape == (4, 5, HIDDEN)
    assert report.dropped > 0
    (y.square().sum() + report.balance_loss).backward()
    gradient = layer.router.get_parameter("weight").grad
    assert gradient is not None
    assert gradient.to_local().abs().max() > 1e-3


def test_options_reach_the_rule(single: Topology) -> None:
    x, logits_TE = tokens_of(40), tokens_of(40) @ router_of(CONFIGS["top1"], single).local("weight").T
    for name, rule in {
        "top1": lambda capacity: top1_gating(logits_TE, capacity, None),
        "top2": lambda capacity: top2_gating(logits_TE, capacity, None),
        "topk": lambda capacity: topk_gating(logits_TE, 3, capacity, "probs"),
        "topk_position": lambda capacity: topk_gating(logits_TE, 3, capacity, "position"),
    }.items():
        for least, multiple in ((0, 1), (9, 1), (30, 1), (0, 32), (None, 1)):
            config = replace(settled(CONFIGS[name]), min_capacity=least, capacity_multiple=multiple)
            config = replace(config, capacity_factor=0.05)
            capacity = deepspeed_capacity(40, 4, config.top_k, 0.05, 4 if least is None else least, multiple)
            routing, expected = router_of(config, single)(x), rule(capacity)
            assert torch.equal(routing.slot_TK, expected.slot_TK)
            assert torch.equal(routing.gate_TK, expected.gate_TK)


def test_default_gating_is_our_own_router(single: Topology) -> None:
    layer = MoELayer(MoESpec(EXPERT, MoEConfig(num_experts=4)), single)
    assert type(layer.router) is Router


def test_an_unknown_gating_is_refused_by_name(single: Topology) -> None:
    with pytest.raises(ValueError, match="deepspeed_top3 is unknown; valid: default, deepspeed_top1"):
        DeepSpeedRouter(RouterSpec(HIDDEN, MoEConfig(num_experts=4, gating="deepspeed_top3"), Init()), single)
    assert {config.gating for config in CONFIGS.values()} == set(GATINGS)


# ---- what is random ----------------------------------------------------------------------------------------------

RANDOM = {name: replace(CONFIGS[name], capacity_factor=0.5, capacity_multiple=1) for name in ("top1", "top2")}


def same(one: Routing, other: Routing) -> bool:
    return torch.equal(one.slot_TK, other.slot_TK)


@pytest.mark.parametrize("name", RANDOM)
def test_randomness_follows_the_default_generator_and_is_on_unless_switched_off(single: Topology, name: str) -> None:
    x = tokens_of(64)
    router = router_of(RANDOM[name], single)
    torch.manual_seed(0)
    first, second = router(x), router(x)
    torch.manual_seed(0)
    again = router(x)
    assert same(first, again)
    assert not same(first, second)
    router = router_of(settled(RANDOM[name]), single)
    state = torch.get_rng_state()
    assert same(router(x), router(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_token_selection_keeps_every_token_alike(single: Topology) -> None:
    router = router_of(replace(RANDOM["top1"], num_experts=1, min_capacity=0), single)  # one expert for 32 tokens
    torch.manual_seed(0)
    draws = 2000
    kept = sum((router(tokens_of(32)).slot_TK[:, 0] >= 0).double() for _ in range(draws)) / draws
    assert kept.sum() == 16  # always full
    assert (kept - 0.5).abs().max() < 5 * 0.5 / draws**0.5


def test_second_experts_are_drawn_by_their_probabilities(single: Topology) -> None:
    draws = 40_000
    router = router_of(replace(RANDOM["top2"], capacity_factor=None), single)
    x = torch.zeros(draws, HIDDEN, dtype=torch.float64)
    x[:, 0] = 1.0
    with torch.no_grad():
        router.get_parameter("weight").to_local()[:, 0] = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    torch.manual_seed(0)
    expert_TK = router(x).slot_TK.div(draws, rounding_mode="floor")
    assert (expert_TK[:, 0] == 1).all()
    share_E = torch.bincount(expert_TK[:, 1], minlength=4) / draws
    assert (share_E - torch.tensor([0.2, 0.0, 0.3, 0.5])).abs().max() < 5 * 0.5 / draws**0.5


@pytest.mark.parametrize("name", RANDOM)
def test_a_recomputed_forward_pass_decides_as_the_first_one(single: Topology, name: str) -> None:
    router = router_of(RANDOM[name], single)
    slots: list[Tensor] = []

    def forward(x_TH: Tensor) -> Tensor:
        routing = router(x_TH)
        slots.append(routing.slot_TK)
        return routing.gate_TK.square().sum()

    checkpoint(forward, tokens_of(64).requires_grad_(), use_reentrant=False).backward()
    assert len(slots) == 2
    assert torch.equal(*slots)


def route_in_a_world(config: MoEConfig, tensor: int) -> list[list[int]]:
    """Every rank routes the same tokens, so that only randomness can differ."""
    torch.manual_seed(0)
    router = router_of(config, Topology(ParallelDegrees(dist.get_world_size(), tensor)))
    return router(tokens_of(64)).slot_TK.tolist()


@pytest.mark.parametrize("name", RANDOM)
def test_tensor_ranks_decide_alike_and_data_ranks_do_not(pool: WorkerPool, name: str) -> None:
    slots = pool.run(4, route_in_a_world, RANDOM[name], 2)
    assert slots[0] == slots[1]
    assert slots[2] == slots[3]
    assert slots[0] != slots[2]


def seeded_training(layout: Layout, job: Job) -> Record | None:
    torch.manual_seed(0)  # as seed_everything does in every process of a run
    return train(layout, job)


@pytest.fixture(scope="module")
def trained(pool: WorkerPool) -> Callable[[Layout, Job], Record]:
    """All of this file's training: the jobs of a layout share a world."""
    four, settled_jobs = Layout(4, tensor=2, expert=2), [Job(moe=settled(config)) for config in CONFIGS.values()]
    random = [Job(moe=config, steps=2) for config in RANDOM.values()]
    jobs = {
        Layout(): settled_jobs + random,
        four: settled_jobs + random,
        Layout(2): random,
        Layout(2, tensor=2): random,
    }

    @cache
    def of(layout: Layout) -> list[Record]:
        ranks = pool.run_each(layout.world_size, seeded_training, [(layout, job) for job in jobs[layout]])
        return [first for first, *_ in ranks]

    return lambda layout, job: of(layout)[jobs[layout].index(job)]


def assert_equal_training(ours: Record, theirs: Record) -> None:
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.gradients, theirs.gradients, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.weights, theirs.weights, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layout_trains_as_one_process_does_when_nothing_is_random(
    trained: Callable[[Layout, Job], Record], name: str
) -> None:
    job = Job(moe=settled(CONFIGS[name]))
    assert_equal_training(trained(Layout(4, tensor=2, expert=2), job), trained(Layout(), job))


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize(
    ("layout", "other"),
    [(Layout(2, tensor=2), Layout()), (Layout(4, tensor=2, expert=2), Layout(2))],
    ids=["one_data_rank", "two_data_ranks"],
)
def test_random_gatings_train_alike_in_layouts_of_as_many_data_ranks(
    trained: Callable[[Layout, Job], Record], name: str, layout: Layout, other: Layout
) -> None:
    job = Job(moe=RANDOM[name], steps=2)
    assert_equal_training(trained(layout, job), trained(other, job))


def test_options_are_null_unless_a_gating_needs_them() -> None:
    options = asdict(MoEConfig(num_experts=4))
    assert options["gating"] == "default"
    names = ("min_capacity", "drop_policy", "random_token_selection", "second_expert_sampling")
    assert [options[name] for name in names] == [None] * 4
