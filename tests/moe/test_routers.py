"""What routers draw, what baselines choose, and whom experts choose, each judged by hand or by its distribution."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tedlab import Topology
from tedlab.config import ModelConfig, MoEConfig, RecomputeConfig, RouterConfig
from tedlab.models import GPT
from tedlab.moe import Router, Routing, routers
from tedlab.nn import Init, initialize

EXPERTS = 6
CONFIG = MoEConfig(num_experts=EXPERTS, top_k=2, capacity_factor=None, capacity_multiple=1)


def router_of(topology: Topology, config: MoEConfig = CONFIG, hidden: int = EXPERTS, **options: Any) -> Router:
    """A router that takes its input for logits, if ``hidden`` is the number of experts."""
    config = replace(config, router=replace(config.router, **options))
    kind = routers[config.gating]
    router = kind(kind.spec(hidden, config, Init(std=1.0)), topology).double()
    initialize(router, 0)
    with torch.no_grad():
        for weight in router.parameters():
            weight.to_local().copy_(torch.eye(config.num_experts, hidden))  # type: ignore[operator]
    return router


def logits(tokens: int, seed: int = 0, experts: int = EXPERTS) -> Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experts_of(router: Router, routing: Routing) -> Tensor:
    slots = len(routing.choice_EC) // router.num_experts
    return routing.slot_TK.div(slots, rounding_mode="floor").masked_fill(routing.slot_TK < 0, -1)


def chosen(router: Router, x_TE: Tensor, step: int = 0, micro_batch: int = 0, sequence: int | None = None) -> Tensor:
    router.context.at(step, micro_batch)
    return experts_of(router, router(x_TE, sequence))


# ---- noise and jitter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"noise": "gumbel"}, {"noise": "normal"}, {"jitter": 0.5}], ids=str)
def test_noise_and_jitter_are_of_training_alone(single: Topology, options: dict[str, Any]) -> None:
    x_TE, quiet = logits(200), router_of(single)
    noisy = router_of(single, **options)
    ours, theirs = noisy.eval()(x_TE), quiet(x_TE)
    assert torch.equal(ours.slot_TK, theirs.slot_TK)
    assert torch.equal(ours.gate_TK, theirs.gate_TK)
    noisy.train()
    assert not torch.equal(chosen(noisy, x_TE), chosen(quiet, x_TE))
    assert torch.equal(chosen(noisy, x_TE, step=3), chosen(noisy, x_TE, step=3))
    assert not torch.equal(chosen(noisy, x_TE, step=3), chosen(noisy, x_TE, step=4))
    assert not torch.equal(chosen(noisy, x_TE, micro_batch=1), chosen(noisy, x_TE, micro_batch=2))


def test_layers_draw_other_numbers(single: Topology) -> None:
    router, x_TE = router_of(single, noise="gumbel").train(), logits(200)
    first = chosen(router, x_TE)
    router.number = 1
    assert not torch.equal(chosen(router, x_TE), first)


def test_weights_and_losses_do_not_see_the_noise(single: Topology) -> None:
    x_TE = logits(200)
    noisy = router_of(single, noise="normal", noise_std=2.0, gates="raw").train()
    routing = noisy(x_TE)
    experts_TK = experts_of(noisy, routing)
    torch.testing.assert_close(routing.gate_TK, x_TE.softmax(-1).gather(1, experts_TK))
    torch.testing.assert_close(routing.report.z_loss, x_TE.logsumexp(-1).square().mean())
    share = torch.bincount(experts_TK.flatten(), minlength=EXPERTS) / experts_TK.numel()
    torch.testing.assert_close(routing.report.balance_loss, EXPERTS * (share.double() @ x_TE.softmax(-1).mean(0)))


def test_with_gumbel_noise_experts_are_sampled_by_their_softmax(single: Topology) -> None:
    """Without replacement: the second one by what the first has left (Kool et al. 2019)."""
    tokens, row_E = 40_000, logits(1)
    p = row_E.softmax(-1).squeeze(0)
    found = chosen(router_of(single, noise="gumbel").train(), row_E.expand(tokens, -1))
    first = torch.bincount(found[:, 0], minlength=EXPERTS) / tokens
    second = sum(p[e] * p.masked_fill(torch.arange(EXPERTS) == e, 0) / (1 - p[e]) for e in range(EXPERTS))
    for frequency, expected in ((first, p), (torch.bincount(found[:, 1], minlength=EXPERTS) / tokens, second)):
        assert (frequency - expected).abs().max() < 4 * 0.5 / math.sqrt(tokens)


def test_normal_noise_has_its_standard_deviation(single: Topology) -> None:
    tokens, std, ahead = 40_000, 0.7, 0.5
    config = MoEConfig(num_experts=2, top_k=1, capacity_factor=None, capacity_multiple=1)
    router = router_of(single, config, 2, noise="normal", noise_std=std).train()
    found = chosen(router, torch.tensor([[0.0, ahead]], dtype=torch.float64).expand(tokens, -1))
    expected = 0.5 * (1 + math.erf(ahead / std / 2))  # of two draws the difference has √2 × their deviation
    assert abs((found == 1).double().mean().item() - expected) < 4 * 0.5 / math.sqrt(tokens)


def test_jitter_multiplies_inputs_by_factors_about_one(single: Topology) -> None:
    router = router_of(single, jitter=0.2).train()
    factors = router.logits(torch.ones(5000, EXPERTS, dtype=torch.float64), 5000)  # the weight is the identity
    assert 0.8 < factors.min() < 0.801
    assert 1.199 < factors.max() < 1.2
    assert abs(factors.mean().item() - 1) < 4 * 0.4 / math.sqrt(12 * factors.numel())
    assert abs(factors.std().item() - 0.4 / math.sqrt(12)) < 0.002
    assert len(factors.unique()) > 0.99 * factors.numel()  # one for each token and feature


@pytest.mark.slow
def test_a_compiled_model_draws_anew_in_each_step_and_is_not_compiled_again(single: Topology) -> None:
    moe = replace(CONFIG, every=1, router=RouterConfig(noise="gumbel", jitter=0.2))
    ids = torch.arange(24).view(4, 6)
    losses: list[list[float]] = []
    for backend in ("none", "aot_eager"):
        torch.compiler.reset()
        model = ModelConfig(2, 8, 2, 16, 6, vocab_size=32, init_std=0.5, compile=backend)
        network = GPT(model, moe, single, seed=0)
        losses.append([])
        for step in range(4):
            single.context.at(step, step % 2)
            with torch.compiler.set_stance("fail_on_recompile" if step > 0 else "default"):
                loss, _ = network.loss(ids, ids)
                loss.backward()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(set(losses[0])) == 4


# ---- biases ------------------------------------------------------------------------------------------------------


def test_biases_count_in_the_choice_alone_and_move_against_the_load(single: Topology) -> None:
    router = router_of(single, bias_update="sign", bias_rate=0.25, gates="raw").train()
    x_TE = logits(200)
    for load, expected in (([3, 1, 2, 2, 2, 2], [-1, 1, 0, 0, 0, 0]), ([6, 6, 0, 0, 0, 0], [-2, 0, 1, 1, 1, 1])):
        router.adjust(torch.tensor(load))
        assert (router.bias.to_local() * 4).tolist() == expected
    routing = router(x_TE)
    p_TE = x_TE.softmax(-1)
    expected_TK = (p_TE + router.bias.to_local()).topk(2, dim=-1).indices
    assert torch.equal(experts_of(router, routing), expected_TK)
    assert not torch.equal(expected_TK, p_TE.topk(2, dim=-1).indices)
    torch.testing.assert_close(routing.gate_TK, p_TE.gather(1, expected_TK))
    proportional = router_of(single, bias_update="proportional", bias_rate=0.5)
    proportional.adjust(torch.tensor([4, 0, 2, 2, 1, 3]))
    torch.testing.assert_close(proportional.bias.to_local(), torch.tensor([-0.5, 0.5, 0.0, 0.0, 0.25, -0.25]))


def test_the_biases_of_a_frozen_router_stay(single: Topology) -> None:
    router = router_of(single, bias_update="sign").train()
    assert router.moves_biases
    for parameter in router.parameters():
        parameter.requires_grad_(False)
    assert not router.moves_biases
    assert router.biased  # they still count in the choice
    assert not router_of(single).moves_biases


def test_biases_stay_in_single_precision(single: Topology) -> None:
    router = router_of(single, bias_update="sign").bfloat16()
    assert router.bias.dtype == torch.float32
    router.adjust(torch.tensor([9, 0, 0, 0, 0, 0]))
    assert router.bias.to_local().tolist() == pytest.approx([-0.001, *[0.001] * 5])
    router.adjust(torch.tensor([0, *[9] * 5]))
    assert not router.bias.to_local().any()  # there and back


@pytest.mark.parametrize("granularity", ["none", "block"])
def test_each_choice_of_a_training_step_is_counted_once(single: Topology, granularity: str) -> None:
    """Recomputed or not; nothing counts that does not train."""
    model = ModelConfig(
        layers=2,
        hidden=8,
        heads=2,
        ffn=16,
        sequence_length=6,
        vocab_size=32,
        recompute=RecomputeConfig(granularity=granularity),
    )
    network = GPT(model, replace(CONFIG, every=1, router=RouterConfig(bias_update="sign")), single, seed=0)
    found = [module for module in network.modules() if isinstance(module, Router)]
    assert len(found) == 2
    ids = torch.arange(24).view(4, 6)

    def trained(ids: Tensor) -> None:
        loss, reports = network.loss(ids, ids)
        (loss + sum(report.balance_loss for report in reports)).backward()

    trained(ids[:3])
    trained(ids[3:])
    with torch.no_grad():
        network(ids)
    network.eval()
    network(ids)
    for layer in found:
        assert layer.take_load().sum() == 24 * CONFIG.top_k
        assert not layer.take_load().any()


# ---- baselines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gating", ["random", "hash", "round_robin"])
def test_baselines_weight_their_choices_equally_and_learn_nothing(single: Topology, gating: str) -> None:
    router = router_of(single, replace(CONFIG, gating=gating, top_k=3))
    assert not list(router.parameters())
    router.context.ids = torch.arange(12).view(2, 6)
    x_TE = logits(12).requires_grad_()
    routing = router(x_TE, 6)
    assert routing.gate_TK.unique().tolist() == pytest.approx([1 / 3])
    experts_TK = experts_of(router, routing)
    assert all(len(set(row)) == 3 for row in experts_TK.tolist())
    assert torch.equal(routing.report.load, torch.bincount(experts_TK.flatten(), minlength=EXPERTS))
    assert not (routing.report.balance_loss + routing.report.z_loss).requires_grad
    assert routing.report.balance_loss.item() == pytest.approx(1)  # as its probabilities are even


def test_the_hash_router_gives_a_token_id_the_same_experts_always(single: Topology) -> None:
    router = router_of(single, replace(CONFIG, gating="hash"))
    by_id: dict[int, list[int]] = {}
    for step, micro_batch, shape in ((0, 0, (4, 50)), (0, 3, (1, 200)), (7, 0, (20, 10)), (8, 1, (2, 100))):
        ids = torch.randint(260, shape, generator=torch.Generator().manual_seed(step))
        router.context.ids = ids
        found = chosen(router, logits(200, step), step, micro_batch, shape[1])
        for token, experts in zip(ids.flatten().tolist(), found.tolist(), strict=True):
            assert by_id.setdefault(token, experts) == experts
    assert len({tuple(experts) for experts in by_id.values()}) > 20  # of 30
    router.context.ids = torch.arange(6000).view(1, -1)
    load = torch.bincount(chosen(router, logits(6000)).flatten(), minlength=EXPERTS)
    assert (load - 2000).abs().max() < 5 * math.sqrt(2000)
    router.context.seed += 1
    try:
        other = chosen(router, logits(6000))
    finally:
        router.context.seed -= 1
    assert not torch.equal(other, chosen(router, logits(6000)))


def test_a_hash_router_that_is_told_no_ids_says_how(single: Topology) -> None:
    router = router_of(single, replace(CONFIG, gating="hash"))
    router.context.ids = None
    with pytest.raises(RuntimeError, match=r"moe.gating=hash chooses experts by token id: set `topology.context.ids`"):
        router(logits(12), 6)


def test_the_round_robin_router_is_balanced_over_every_global_batch(single: Topology) -> None:
    """Exactly, however it is divided into micro-batches."""
    router = router_of(single, replace(CONFIG, gating="round_robin", top_k=4))
    whole = chosen(router, logits(36), sequence=6)
    assert whole[:3].tolist() == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]
    assert torch.bincount(whole.flatten()).tolist() == [24] * EXPERTS
    parts = [chosen(router, logits(12), step, number, 6) for step, number in ((0, 0), (1, 1), (2, 2))]
    assert torch.equal(torch.cat(parts), whole)


def test_the_random_router_draws_anew_in_each_step_and_layer(single: Topology) -> None:
    router = router_of(single, replace(CONFIG, gating="random"))
    first = chosen(router, logits(300), 0, 0, 6)
    assert torch.equal(chosen(router, logits(300, 1), 0, 0, 6), first)
    others = [chosen(router, logits(300), 1, 0, 6), chosen(router, logits(300), 0, 1, 6)]
    router.number = 1
    others.append(chosen(router, logits(300), 0, 0, 6))
    for other in others:
        same = (other.sort(-1).values == first.sort(-1).values).all(1).double().mean()
        assert 0.0 < same < 3 / 15  # of 15 pairs
    parts = [chosen(router, logits(150), 0, number, 6) for number in (0, 1)]
    router.number = 0
    assert not torch.equal(torch.cat(parts), first)
    parts = [chosen(router, logits(150), 0, number, 6) for number in (0, 1)]
    assert torch.equal(torch.cat(parts), first)


# ---- expert choice -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("top_k", "factor", "groups"), [(1, 1.0, 1), (2, 1.0, 3), (2, 0.5, 2), (3, 2.0, 1), (6, 1.0, 2)]
)
def test_every_expert_takes_its_best_tokens(
    single: Topology, scoring: str, top_k: int, factor: float, groups: int
) -> None:
    samples, sequence = 3, 6
    config = MoEConfig(
        num_experts=EXPERTS,
        top_k=top_k,
        capacity_factor=factor,
        capacity_multiple=1,
        capacity_groups=groups,
        gating="expert_choice",
        router=RouterConfig(scoring=scoring, gate_scale=1.5),
    )
    router, x_TE = router_of(single, config), logits(samples * sequence, top_k)
    routing = router(x_TE, sequence)
    score_TE = x_TE.sigmoid() if scoring == "sigmoid" else x_TE.softmax(-1)
    capacity = math.ceil(top_k * samples * sequence / groups / EXPERTS * factor)
    taken = torch.zeros(samples * sequence, EXPERTS, dtype=torch.bool)
    for group in range(groups):
        own = [t for t in range(samples * sequence) if t % sequence * groups // sequence == group]
        for expert in range(EXPERTS):
            for token in sorted(own, key=lambda t: -score_TE[t, expert])[:capacity]:
                taken[token, expert] = True
    gates_TE = torch.zeros_like(score_TE)
    place_TK = experts_of(router, routing)
    for token in range(len(x_TE)):
        for place, expert in enumerate(place_TK[token].tolist()):
            if expert >= 0:
                gates_TE[token, expert] = routing.gate_TK[token, place]
    torch.testing.assert_close(gates_TE, 1.5 * score_TE * taken)
    assert torch.equal(routing.report.load, taken.sum(0))
    assert routing.report.dropped == top_k * (~taken.any(1)).sum()
    slots = routing.slot_TK[routing.slot_TK >= 0]
    assert len(slots.unique()) == len(slots) == int(taken.sum())
    filled = routing.choice_EC >= 0
    assert torch.equal(routing.choice_EC[slots], torch.arange(place_TK.numel()).view_as(place_TK)[routing.slot_TK >= 0])
    assert int(filled.sum()) == len(slots)
