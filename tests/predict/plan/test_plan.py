"""A plan is the fastest layout that fits, its file is what training takes, and what does not fit is named."""

import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tedlab.cli import with_plan
from tedlab.commands.plan import overrides_of_the_job
from tedlab.config import TrainConfig, with_values
from tedlab.errors import UsageError
from tedlab.models.shortcut import BESIDE
from tedlab.predict.cluster import load_cluster
from tedlab.predict.estimate import estimate
from tedlab.predict.plan import plan as plan_module
from tedlab.predict.plan.family import base_parameters, member
from tedlab.predict.plan.file import read
from tedlab.predict.plan.plan import Plan, largest_models, make_plan
from tedlab.predict.plan.plan import overrides as overrides_of
from tedlab.predict.plan.search import (
    CHOSEN,
    TOGGLES,
    Candidate,
    Degrees,
    Found,
    foldings,
    layouts,
    pareto_front,
    reordered,
    search,
    smallest,
)
from tedlab.predict.plan.show import _gain, fixed_by, plan_visibly
from tedlab.validate import check_simulated, complete_simulated
from tests.certify.runs import composed

GIVEN = ["trainer=gpu", "parallel.world_size=16", "data.batch_size=32", "trainer.precision=bf16-true"]
GIVEN += ["model.layers=4", "model.hidden=256", "model.heads=8", "model.ffn=1024", "moe.num_experts=8"]
SUMMIT = load_cluster("summit")


@functools.cache
def searched(capacity: float, *fixed: str) -> tuple[TrainConfig, Found]:
    config, found = composed(*GIVEN), Found()
    for degrees in layouts(config, fixed):
        found.add(search(config, SUMMIT, capacity, fixed, degrees))
    return config, found


@pytest.mark.slow
def test_every_candidate_validates_and_fits() -> None:
    config, found = searched(140 * 2**20)
    assert len(found.fitting) > 100
    assert {c.settings["parallel.tensor"] for c in found.fitting} == {1, 2, 4, 8}
    for candidate in found.fitting[::10]:
        check_simulated(with_values(config, candidate.settings))
        assert candidate.peak_bytes <= 140 * 2**20


@pytest.mark.slow
def test_what_is_refused_is_counted_by_reason_and_the_nearest_miss_is_the_smallest() -> None:
    _, everything = searched(float("inf"))
    _, found = searched(140 * 2**20)
    assert found.refused["model.heads (8) is not divisible by parallel.tensor (16)"] == 1
    assert len(found.fitting) + found.too_large == len(everything.fitting)
    assert found.nearest is not None
    assert found.nearest.peak_bytes == min(c.peak_bytes for c in everything.fitting if c.peak_bytes > 140 * 2**20)


def test_the_front_has_all_that_nothing_beats_and_no_other() -> None:
    _, found = searched(float("inf"), "optim.tile", "data.micro_batch_size")
    front = pareto_front(found.fitting)
    assert [c.step_seconds for c in front] == sorted(c.step_seconds for c in front)
    assert 1 < len(front) < len(found.fitting)
    for candidate in found.fitting:
        beaten = any(all(a <= b for a, b in zip(best.costs, candidate.costs, strict=True)) for best in front)
        assert beaten
    for one in front:
        assert not any(
            other is not one and all(a <= b for a, b in zip(other.costs, one.costs, strict=True)) for other in front
        )


def test_what_the_command_line_sets_stays() -> None:
    assert fixed_by(["comm=ted", "parallel.tensor=2", "data.batch_size=32"]) == [
        "comm.cac",
        "comm.dtd",
        "comm.fuse_reduce_scatter",
        "parallel.tensor",
    ]
    _, found = searched(float("inf"), "parallel.tensor", "optim.tile")
    assert {(c.settings["parallel.tensor"], c.settings["optim.tile"]) for c in found.fitting} == {(2, "auto")}


@pytest.mark.parametrize("degrees", [Degrees(2, 8), Degrees(4, 8, 1)])
@pytest.mark.parametrize("preset", ["ted", "ted_fused"])
def test_a_preset_of_communication_is_found_with_the_recomputation_that_it_needs(preset: str, degrees: Degrees) -> None:
    given = f"comm={preset}"
    fixed = [*fixed_by([given]), "data.micro_batch_size", "optim.tile"]
    config = composed(*GIVEN, "data.micro_batch_size=4", given)
    (found,) = search(config, SUMMIT, float("inf"), fixed, degrees, beat=1e9).fitting
    assert (found.settings["comm.cac"], found.settings["comm.dtd"]) == (True, True)
    assert found.settings["comm.fuse_reduce_scatter"] == (preset == "ted_fused")
    assert found.settings["model.recompute.granularity"] == "block"


@pytest.mark.parametrize("shortcut", ["pos1", "pos3"])
def test_experts_of_a_shortcut_compute_where_the_step_is_shortest(shortcut: str) -> None:
    pairs = [
        f"moe.shortcut={shortcut}",
        "moe.shared.experts=1",
        "data.micro_batch_size=4",
        "comm.overlap_shortcut=true",
    ]
    config, fixed = composed(*GIVEN, *pairs), (*TOGGLES, "data.micro_batch_size")
    (found,) = search(config, SUMMIT, float("inf"), fixed, Degrees(2, 8)).fitting
    steps = []
    for slot in range(BESIDE[shortcut] + 1):
        there = with_values(config, {**found.settings, "comm.shortcut_slot": slot})
        steps.append(estimate(complete_simulated(there, SUMMIT), SUMMIT, found.rank).step_seconds)
    assert found.step_seconds == steps[found.settings["comm.shortcut_slot"]] == min(steps) < max(steps)
    given = with_values(config, {"comm.shortcut_slot": 0})
    (kept,) = search(given, SUMMIT, float("inf"), fixed, Degrees(2, 8)).fitting
    assert "comm.shortcut_slot" not in kept.settings
    assert kept.step_seconds == steps[0]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """As from the command line, on a cluster of two nodes' worth of GPUs."""
    directory = tmp_path_factory.mktemp("plan")
    given = [*GIVEN, "data.micro_batch_size=1"]
    config = composed(*given, f"output_dir={directory}")
    found = plan_visibly(
        config,
        "dgx_a100",
        load_cluster("dgx_a100"),
        reserve_gib=1.2,
        simulations=2,
        find_largest=False,
        given=[*given, "optim.lr=0.001"],
        warnings=["a run says\noptim.lr=9\u2028seed=9"],
    )
    return found, directory / "plan.overrides"


def test_the_winner_is_the_fastest_that_was_simulated(plan: tuple[Plan, Path]) -> None:
    found, _ = plan
    assert found.winner.step_seconds == min(c.step_seconds for c in found.simulated)
    estimated = next(c for c in found.front if c.settings == found.winner.settings)
    assert found.winner.peak_bytes == pytest.approx(estimated.peak_bytes, rel=0.06)


def test_a_warning_adds_no_override_to_the_file(plan: tuple[Plan, Path]) -> None:
    assert not {"optim.lr=9", "seed=9"} & set(read(plan[1]))
    assert "# warning: a run says optim.lr=9 seed=9\n" in plan[1].read_text()


def test_training_takes_the_file_and_the_command_line_wins_over_it(plan: tuple[Plan, Path]) -> None:
    found, path = plan
    config = composed(*with_plan([f"+plan={path}"]))
    assert config.parallel.tensor == found.winner.settings["parallel.tensor"]
    assert (config.trainer["devices"], config.trainer["num_nodes"], config.optim.lr) == (8, 2, 0.001)
    check_simulated(config)
    changed = composed(*with_plan([f"+plan={path}", "optim.lr=0.5", "comm=ted", "model=gpt_tiny"]))
    assert (changed.optim.lr, changed.comm.dtd, changed.comm.cac, changed.model.hidden) == (0.5, True, True, 128)
    with pytest.raises(UsageError, match=r"no such file.*`tedlab plan` writes one"):
        with_plan(["+plan=nowhere"])


def test_the_largest_model_fits_and_a_somewhat_larger_one_does_not() -> None:
    capacity = SUMMIT.memory_bytes - 2**30
    config = composed(*GIVEN)
    fixed = ["parallel.tensor"]  # 2
    best = largest_models(config, SUMMIT, ThreadPoolExecutor(1), reserve=2**30, fixed=fixed)[2]
    peaks = [smallest(best, SUMMIT, fixed, pair) for pair in layouts(best, fixed)]
    assert 0.9 * capacity < min(peak for peak in peaks if peak is not None) <= capacity
    larger = member(config, best.model.hidden + 256, 2)
    assert base_parameters(larger) > base_parameters(best)
    peaks = [smallest(larger, SUMMIT, fixed, pair) for pair in layouts(larger, fixed)]
    assert all(peak is not None and peak > capacity for peak in peaks)


def test_a_folded_layout_has_room_for_a_larger_model() -> None:
    """With four experts and dense layers that are whole, only so folded do sixteen processes divide the experts."""
    capacity, fixed = SUMMIT.memory_bytes - 2**30, ["parallel.tensor"]
    config = composed(*GIVEN, "parallel.world_size=16", "parallel.tensor=1", "moe.num_experts=4")
    best = largest_models(config, SUMMIT, ThreadPoolExecutor(1), reserve=2**30, fixed=fixed)[1]
    peaks = [smallest(best, SUMMIT, fixed, one) for one in layouts(best, fixed)]
    assert all(peak is None or peak > capacity for peak in peaks)
    peaks = [smallest(best, SUMMIT, fixed, Degrees(1, 4, width)) for width in (2, 4)]
    assert min(peak for peak in peaks if peak is not None) <= capacity


def test_the_family_has_gpt3s_models() -> None:
    for name, width in (("gpt_1.3b", 2048), ("gpt_2.7b", 2560), ("gpt_6.7b", 4096), ("gpt_13b", 5120)):
        theirs, ours = composed(f"model={name}").model, member(composed(), width).model
        assert (ours.layers, ours.hidden, ours.ffn) == (theirs.layers, theirs.hidden, theirs.ffn)


# ---- folding -------------------------------------------------------------------------------------------------------

# Attention is divided over four processes, as memory may demand, in nodes of eight, for 64 narrow experts.
FINE = ["trainer=gpu", "parallel.world_size=16", "parallel.tensor=4", "data.batch_size=8", "data.micro_batch_size=1"]
FINE += ["trainer.precision=bf16-true", "model.layers=2", "model.hidden=1024", "model.heads=8", "model.ffn=256"]
FINE += ["model.sequence_length=1024", "model.vocab_size=512", "moe.num_experts=64", "moe.top_k=8", "moe.every=1"]
FINE += ["model.recompute.granularity=none", "comm.cac=false", "optim.tile=fused"]


DGX = load_cluster("dgx_h100")
FIXED = [name for override in FINE if (name := override.partition("=")[0]) in CHOSEN]


def as_simulated(config: TrainConfig, cluster: object, candidate: Candidate) -> Candidate:
    return candidate


def planned(monkeypatch: pytest.MonkeyPatch, *overrides: str, fixed: Sequence[str] = ()) -> Plan:
    monkeypatch.setattr(plan_module, "simulated", as_simulated)
    kept = [*FIXED, *fixed]
    cluster, workers = load_cluster("dgx_h100"), ThreadPoolExecutor(1)
    return make_plan(composed(*FINE, *overrides), cluster, workers, reserve=0, simulations=2, fixed=kept)


def test_narrow_experts_are_better_whole_where_attention_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows, eight of each token, would be gathered and summed over tensor ranks; whole ones gather nothing.

    In a node, eight processes can hold all experts whole. Then an exchange has a quarter of the rows of a data rank,
    7/8 of which leave the process. Divided by four, experts of two such processes exchange as many, of which half stay,
    and then gather all rows, 3/4 of which come from others, and sum as many.
    """
    plan = planned(monkeypatch)
    winner, other = plan.winner, plan.unfolded
    assert other is not None
    assert winner.folded
    assert (winner.settings["parallel.expert_tensor"], winner.settings["parallel.expert"]) == (1, 8)
    assert winner.between_nodes_bytes <= other.between_nodes_bytes
    assert other.step_seconds / winner.step_seconds > 1.1
    assert f"({other.step_seconds / winner.step_seconds:.2f} ×)" in _gain(plan)
    assert "parallel.expert_tensor=1" in overrides_of(winner)
    assert "parallel.expert_tensor" not in other.settings


def test_a_folded_layout_that_cannot_win_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cluster, fixed = composed(*FINE), load_cluster("dgx_h100"), ["data.micro_batch_size"]
    degrees = Degrees(4, 8, 1)
    whole = search(config, cluster, math.inf, fixed, degrees)
    assert whole.fitting
    assert search(config, cluster, math.inf, fixed, degrees, whole.fastest * 1.001).fitting
    left_out = search(config, cluster, math.inf, fixed, degrees, whole.fastest)
    assert (left_out.fitting, left_out.slower) == ([], 1)


@pytest.mark.parametrize("degrees", [Degrees(4, 8, 1), Degrees(4, 4, 2)])
def test_slices_that_are_asked_for_are_found_in_folded_layouts(degrees: Degrees) -> None:
    config = composed(*FINE, "moe.slice=tokens")
    found = search(config, load_cluster("dgx_h100"), math.inf, [*FIXED, "moe.slice"], degrees, beat=1e9)
    assert [(c.settings["moe.slice"], c.settings["comm.dtd"]) for c in found.fitting] == [("tokens", False)]
    assert not found.refused
    assert not found.slower


def test_the_best_layout_that_slices_is_xmoes(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(monkeypatch, "moe.slice=tokens", fixed=["moe.slice"])
    assert plan.winner.settings["parallel.expert_tensor"] == 1
    assert {candidate.settings["moe.slice"] for candidate in plan.found.fitting} == {"tokens"}
    assert plan.unfolded is not None
    assert plan.unfolded.step_seconds > plan.winner.step_seconds


@pytest.mark.parametrize("degrees", [Degrees(4, 8, 1), Degrees(4, 4, 2)])
def test_a_folded_layout_without_dtd_deals_like_one_with_it(degrees: Degrees) -> None:
    config, cluster = composed(*FINE), load_cluster("dgx_h100")
    asked, free = (search(config, cluster, math.inf, fixed, degrees) for fixed in ([*FIXED, "comm.dtd"], FIXED))
    assert {candidate.settings["comm.dtd"] for candidate in asked.fitting} == {False}
    assert {candidate.settings["comm.dtd"] for candidate in free.fitting} == {False, True}
    assert [candidate.costs for candidate in asked.fitting] == [candidate.costs for candidate in free.fitting]


def test_a_folded_layout_is_not_slower_because_its_largest_micro_batch_is_refused() -> None:
    """A data rank has two samples a step, so two micro-batches, as is given, have one each."""
    fixed = [name for name in FIXED if name != "data.micro_batch_size"]
    config = composed(*FINE, "trainer.accumulate_grad_batches=2")
    found = search(config, load_cluster("dgx_h100"), math.inf, fixed, Degrees(4, 8, 1), beat=1e9)
    assert {candidate.settings["data.micro_batch_size"] for candidate in found.fitting} == {1}
    assert found.slower == 0
    assert sum(found.refused.values()) == len(found.fitting)


def test_micro_batches_beside_each_other_are_planned_where_a_step_has_two() -> None:
    """A data rank has four samples a step."""
    off, on = (
        search(composed(*GIVEN, f"comm.interleave={on}"), SUMMIT, math.inf, [*TOGGLES], Degrees(2, 8))
        for on in ("false", "true")
    )
    by_size = [{c.settings["data.micro_batch_size"]: c for c in found.fitting} for found in (off, on)]
    assert [found.keys() for found in by_size] == [{1, 2, 4}, {1, 2}]
    for size, beside in by_size[1].items():
        assert beside.step_seconds < by_size[0][size].step_seconds
        assert beside.peak_bytes > by_size[0][size].peak_bytes
        assert beside.between_nodes_bytes == by_size[0][size].between_nodes_bytes
    ((reason, times),) = on.refused.items()
    assert (times, "but a step has 1" in reason) == (1, True)


# Eight processes of a node hold all experts, of which the next node has replicas.
REPLICAS = ("parallel.tensor=1", "parallel.expert=8", "data.batch_size=16", "moe.top_k=1")


@pytest.mark.parametrize(("tokens", "order"), [(16, "expert_data"), (4096, None)])
def test_replicas_are_neighbours_where_reductions_outweigh_exchanges(
    monkeypatch: pytest.MonkeyPatch, tokens: int, order: str | None
) -> None:
    """The weights' gradients are as large whatever a step computes; what is exchanged grows with its tokens."""
    given = (*REPLICAS, f"model.sequence_length={tokens}")
    fixed = ["parallel.expert", "parallel.expert_tensor"]
    plan = planned(monkeypatch, *given, fixed=fixed)
    assert plan.winner.settings.get("parallel.order") == order
    assert (f"parallel.order={order}" in overrides_of(plan.winner)) == (order is not None)
    asked = planned(monkeypatch, *given, fixed=[*fixed, "parallel.order"])
    assert all("parallel.order" not in candidate.settings for candidate in asked.found.fitting)
    other = reordered(composed(*FINE, *given), DGX, asked.winner)
    assert other is not None
    assert other.peak_bytes == asked.winner.peak_bytes
    assert (other.step_seconds < asked.winner.step_seconds) == (order is not None)


def test_an_order_is_not_tried_where_there_is_one() -> None:
    """Without replicas, or with all experts in each process."""
    config = composed(*FINE, "parallel.tensor=1", "data.batch_size=16")
    for expert in (1, 16):
        candidate = search(config, DGX, math.inf, FIXED, Degrees(1, expert)).fitting[0]
        assert reordered(config, DGX, candidate) is None


def test_foldings_are_all_that_multiply_and_divide() -> None:
    config = composed(*FINE, "parallel.world_size=8", "moe.num_experts=4", "model.ffn=24")
    assert {tuple(one) for one in foldings(config, [], {2, 8}, most=4)} == {
        *((2, 1, 1), (2, 2, 1), (2, 4, 1), (2, 1, 4), (2, 2, 4)),
        *((8, 1, 1), (8, 2, 1), (8, 4, 1), (8, 1, 2), (8, 2, 2), (8, 4, 2), (8, 1, 4), (8, 2, 4)),
    }
    assert foldings(config, ["parallel.expert_tensor"], {2, 8}, most=4) == []
    assert foldings(composed("moe=dense", "parallel=tp2"), [], {2}, most=4) == []
    (only,) = layouts(
        with_values(config, {"parallel.tensor": 8, "parallel.expert": 4, "parallel.expert_tensor": 2}),
        ["parallel.tensor", "parallel.expert", "parallel.expert_tensor"],
    )
    assert only == (8, 4, 2)


def test_positions_are_sliced_around_experts_alone_if_the_sequence_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(monkeypatch, fixed=["parallel.sequence", "parallel.expert"])
    assert plan.winner.settings["moe.slice"] == "tokens"
    assert all("moe.slice" not in candidate.settings for candidate in planned(monkeypatch).found.fitting)


# ---- what the user gets wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "overrides", "said"),
    [
        ("summit", [*GIVEN, "parallel.world_size=7"], ["No layout is possible", "data.batch_size (32)", "tensor (7)"]),
        ("one_h200", GIVEN, ["no rank 15", "one node of 1"]),
        (
            "summit",
            ["trainer=gpu", "model=gpt_13b", "parallel.world_size=2", "data.batch_size=2"],
            ["Nothing fits", "GiB more than there are", "parallel.tensor=", "fullest moment", "plan.largest=true"],
        ),
    ],
)
def test_without_a_layout_it_says_why(cluster: str, overrides: list[str], said: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        make_plan(composed(*overrides), load_cluster(cluster), ThreadPoolExecutor(1), reserve=0, simulations=1)
    assert all(text in str(error.value) for text in said), str(error.value)


def test_what_was_asked_of_the_plan_is_no_part_of_the_job() -> None:
    asked = [
        "cluster=summit",
        "parallel.world_size=8",
        "+plan.largest=true",
        "cluster.gpus_per_node=4",
        "model=gpt_tiny",
    ]
    assert overrides_of_the_job(asked) == ["parallel.world_size=8", "model=gpt_tiny", "trainer=gpu"]
    assert overrides_of_the_job(["trainer=cpu"]) == ["trainer=cpu"]
