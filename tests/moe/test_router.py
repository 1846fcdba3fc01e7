"""Which expert a token goes to, with which weight, and into which slot."""

import random

import pytest
import torch
from torch import Tensor
from torch._inductor.exc import InductorError

from tedlab import Topology
from tedlab.capacity import expert_capacity
from tedlab.config import MoEConfig
from tedlab.moe import Router, RouterSpec, Routing, assign_slots
from tedlab.moe.precise import bf16_parts
from tedlab.moe.slots import sort_choices
from tedlab.nn import Init, initialize

# ---- capacity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "factor", "multiple", "capacity"),
    [
        (64, 4, 1, 1.0, 1, 16),
        (64, 4, 1, 1.25, 1, 20),
        (64, 4, 1, 1.25, 8, 24),  # rounded up to the multiple
        (64, 4, 1, 1.0, 8, 16),  # already a multiple
        (64, 4, 2, 1.0, 8, 32),
        (65, 4, 1, 1.0, 1, 17),  # rounded up once, after the factor
        (10, 4, 1, 1.5, 1, 4),
        (1, 8, 1, 0.5, 1, 1),
        (1, 8, 1, 0.5, 4, 4),
        (40, 4, 1, None, 8, 40),  # every token may go to one expert
        (41, 4, 2, None, 8, 48),
        (5, 4, 3, None, 1, 5),
        (10, 1, 1, 1.1, 1, 11),  # exactly, not 10 × 1.1 in floating point
    ],
)
def test_capacity(tokens: int, experts: int, top_k: int, factor: float | None, multiple: int, capacity: int) -> None:
    assert expert_capacity(tokens, experts, top_k, factor, multiple) == capacity


# ---- slots -------------------------------------------------------------------------------------------------------


def one_by_one(expert_TK: Tensor, num_experts: int, capacity: int) -> tuple[list[list[int]], list[int], list[int]]:
    """What ``assign_slots`` should give, by going through the choices in order of priority."""
    tokens, top_k = expert_TK.shape
    slots = [[-1] * top_k for _ in range(tokens)]
    choices, load = [-1] * (num_experts * capacity), [0] * num_experts
    for k in range(top_k):
        for t in range(tokens):
            expert = int(expert_TK[t, k])
            if load[expert] < capacity:
                slots[t][k] = expert * capacity + load[expert]
                choices[slots[t][k]] = t * top_k + k
            load[expert] += 1
    return slots, choices, load


def random_choices(seed: int) -> tuple[Tensor, int, int]:
    """T × K distinct choices per token, of all experts or (so that others stay empty) of a few."""
    draw = random.Random(seed)
    top_k = draw.randint(1, 3)
    experts = draw.randint(top_k, 8)
    used = draw.sample(range(experts), draw.randint(top_k, experts))
    expert_TK = torch.tensor([draw.sample(used, top_k) for _ in range(draw.randint(1, 40))])
    return expert_TK, experts, draw.choice([1, 2, 3, 8, 40])


SLOTS = {f"random_{seed}": random_choices(seed) for seed in range(60)} | {
    "all_to_the_last": (torch.full((12, 1), 3), 4, 5),
    "all_to_the_first": (torch.zeros(12, 1, dtype=torch.int64), 4, 12),
    "one_expert": (torch.zeros(3, 1, dtype=torch.int64), 1, 2),
    "no_token": (torch.zeros(0, 2, dtype=torch.int64), 4, 3),
    "no_capacity": (torch.zeros(3, 1, dtype=torch.int64), 2, 0),
}


@pytest.mark.parametrize("name", SLOTS)
def test_slots_are_given_first_come_first_served(name: str) -> None:
    expert_TK, experts, capacity = SLOTS[name]
    slot_TK, choice_EC, load_E = assign_slots(expert_TK, experts, capacity)
    slots, choices, load = one_by_one(expert_TK, experts, capacity)
    assert slot_TK.tolist() == slots
    assert choice_EC.tolist() == choices
    assert load_E.tolist() == load


def test_the_random_cases_drop_some_fill_some_and_leave_some_empty() -> None:
    """Otherwise the comparison above would prove little."""
    outcomes = [assign_slots(*case) for name, case in SLOTS.items() if name.startswith("random")]
    assert sum(bool((slot < 0).any()) for slot, _, _ in outcomes) > 10
    assert sum(bool((slot >= 0).all()) for slot, _, _ in outcomes) > 10
    assert sum(bool((load == 0).any()) for _, _, load in outcomes) > 10


def test_a_second_choice_waits_until_all_first_choices_are_placed() -> None:
    slot_TK, _, _ = assign_slots(torch.tensor([[1, 0], [1, 0], [0, 1]]), num_experts=2, capacity=2)
    assert slot_TK.tolist() == [[2, 1], [3, -1], [0, -1]]


def test_choices_of_any_number_of_experts_are_sorted() -> None:
    """Keys are one byte or two wide where these hold the number of every expert."""
    for experts in (1, 255, 256, 257, 32_767, 32_768, 32_769, 70_000):
        draw = random.Random(experts)
        expert_TK = torch.tensor([[draw.randrange(experts), experts - 1 - number % experts] for number in range(20)])
        place_TK, choice, load_E = sort_choices(expert_TK, experts)
        flat = expert_TK.flatten().tolist()
        assert choice.tolist() == sorted(range(40), key=lambda number: flat[number]), experts
        assert place_TK.flatten()[choice].tolist() == list(range(40))
        assert torch.equal(load_E, torch.bincount(expert_TK.flatten(), minlength=experts))


# ---- the router --------------------------------------------------------------------------------------------------


def route(single: Topology, logits: Tensor, top_k: int = 1, factor: float | None = None) -> tuple[Routing, Router]:
    """Routes as many tokens as there are rows, each with exactly these logits."""
    tokens, experts = logits.shape
    config = MoEConfig(num_experts=experts, top_k=top_k, capacity_factor=factor, capacity_multiple=1)
    router = Router(RouterSpec(tokens, config, Init(std=1.0)), single).to(logits.dtype)
    initialize(router, 0)
    with torch.no_grad():
        router.get_parameter("weight").to_local().copy_(logits.T)
    return router(torch.eye(tokens, dtype=logits.dtype)), router


@pytest.mark.parametrize(("assigned", "loss"), [([0, 1, 2, 3] * 2, 1.0), ([2] * 8, 4.0), ([0] * 4 + [1] * 4, 2.0)])
def test_balance_loss_is_one_when_balanced_and_the_number_of_experts_when_collapsed(
    single: Topology, assigned: list[int], loss: float
) -> None:
    certain = torch.full((8, 4), -50.0, dtype=torch.float64)
    certain[range(8), assigned] = 50.0
    routing, _ = route(single, certain)
    assert routing.report.balance_loss.item() == pytest.approx(loss)
    assert routing.report.load.tolist() == [assigned.count(e) for e in range(4)]


LOGITS = 2 * torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("factor", [None, 0.5])
def test_losses_and_counts_are_as_defined(single: Topology, top_k: int, factor: float | None) -> None:
    routing, router = route(single, LOGITS, top_k, factor)
    probabilities = LOGITS.softmax(-1)
    chosen = probabilities.argsort(-1, descending=True)[:, :top_k]
    share = torch.bincount(chosen.flatten(), minlength=4) / (9 * top_k)  # all choices count
    capacity = expert_capacity(9, 4, top_k, factor, 1)
    report = routing.report
    assert report.balance_loss.item() == pytest.approx(4 * float(share.double() @ probabilities.mean(0)))
    assert report.z_loss.item() == pytest.approx(LOGITS.exp().sum(-1).log().square().mean().item())
    assert report.load.tolist() == torch.bincount(chosen.flatten(), minlength=4).tolist()
    assert report.dropped.item() == (report.load - capacity).clamp(min=0).sum().item()
    assert (report.dropped > 0) == (factor is not None)
    expert_TK = routing.slot_TK.div(capacity, rounding_mode="floor")
    assert torch.equal(expert_TK[routing.slot_TK >= 0], chosen[routing.slot_TK >= 0])
    for loss in (report.balance_loss, report.z_loss):
        (gradient,) = torch.autograd.grad(loss, router.get_parameter("weight"), retain_graph=True)
        assert gradient.to_local().abs().max() > 1e-3


@pytest.mark.parametrize("top_k", [1, 2])
def test_ties_are_decided_alike_however_many_tokens_there_are(single: Topology, top_k: int) -> None:
    """Else a slice of a sequence would route other than the whole."""
    tied = torch.randint(2, (32, 6), generator=torch.Generator().manual_seed(0)).double()

    def chosen(logits: Tensor) -> list[list[int]]:
        return route(single, logits, top_k)[0].slot_TK.div(len(logits), rounding_mode="floor").tolist()

    assert [row for start in range(0, 32, 4) for row in chosen(tied[start : start + 4])] == chosen(tied)


def test_the_gate_of_one_choice_is_its_probability(single: Topology) -> None:
    gate_TK = route(single, LOGITS)[0].gate_TK
    torch.testing.assert_close(gate_TK, LOGITS.softmax(-1).amax(-1, keepdim=True))


@pytest.mark.parametrize("top_k", [2, 3])
def test_gates_of_several_choices_sum_to_one_also_if_some_are_dropped(single: Topology, top_k: int) -> None:
    routing, _ = route(single, LOGITS, top_k, factor=0.5)
    assert (routing.slot_TK < 0).any()
    torch.testing.assert_close(routing.gate_TK.sum(-1), torch.ones(9, dtype=torch.float64))
    best = LOGITS.softmax(-1).topk(top_k).values
    torch.testing.assert_close(routing.gate_TK, best / best.sum(-1, keepdim=True))


def test_routing_of_low_precision_tokens_is_computed_in_fp32(single: Topology) -> None:
    routing, _ = route(single, LOGITS.bfloat16())
    assert routing.gate_TK.dtype == routing.report.balance_loss.dtype == routing.report.z_loss.dtype == torch.float32
    expected = LOGITS.bfloat16().float().softmax(-1).amax(-1, keepdim=True)
    torch.testing.assert_close(routing.gate_TK, expected, rtol=1e-6, atol=0)


# ---- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_three_numbers_in_bf16_are_one_in_fp32(compiled: bool) -> None:
    split = bf16_parts
    if compiled:
        split = torch.compile(bf16_parts)  # inductor computes in fp32 what it may, and leaves out conversions
        try:
            torch.compile(torch.sin)(torch.ones(2))
        except InductorError as error:
            pytest.skip(f"inductor compiles nothing here, such as for want of a C++ compiler: {error}")
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-25, 25, 1000)
    parts = split(x)
    assert all(part.dtype is torch.bfloat16 for part in parts)
    assert torch.equal(torch.stack([part.double() for part in parts]).sum(0), x.double())
