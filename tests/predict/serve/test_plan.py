"""A plan of generation is the best of all choices, by costs added up in another way; what does not fit is named."""

import io
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from rich.console import Console

from tedlab import ParallelDegrees
from tedlab.commands.plan import PlanningConfig, check_of_phase, inference, prepared
from tedlab.config import PlanConfig, ServeConfig, TrainConfig, with_values
from tedlab.errors import UsageError
from tedlab.predict.cluster import ClusterConfig, load_cluster
from tedlab.predict.cost import collective_seconds, exchange_seconds
from tedlab.predict.serve.passes import Pass
from tedlab.predict.serve.plan import Found, Generation, served
from tedlab.predict.serve.show import plan_generation
from tedlab.predict.serve.switch import switches
from tedlab.predict.sim.roofline import seconds
from tedlab.predict.spread import Spread
from tedlab.relayout import held, moved_elements, moves_of
from tedlab.spec import ParameterSpec
from tests.certify.runs import composed

CLUSTER = load_cluster("dgx_a100")
REQUEST = ServeConfig(prompt=512, output=65, batch=32)


def job(*overrides: str) -> TrainConfig:
    sizes = ["model.layers=4", "model.hidden=512", "model.heads=8", "model.ffn=1024", "model.sequence_length=1024"]
    mixture = ["moe=top2", "moe.num_experts=8", "trainer=gpu", "trainer.precision=bf16-true"]
    return composed(*sizes, *mixture, "parallel=single", "parallel.world_size=8", *overrides)


def added_up(generation: Generation, name: str, degrees: ParallelDegrees) -> float:
    """The seconds of a pass, kernel after kernel and collective after collective."""
    form = Pass(generation.config, degrees, generation.tokens[name])
    ends = form.spec.ends
    works = [work for n, block in enumerate(form.blocks) for work in block.forward(form.at(n))]
    works += [work for part in ends[:-2] for work in part.forward(form.at())]
    works += ends[-2].forward(replace(form.at(), tokens=form.texts, length=1))
    groups = form.layout.groups(0)
    calls = (collective_seconds(c.op, c.even_payload_bytes, groups[c.kind], CLUSTER) for c in form.collectives())
    return sum(seconds(work, CLUSTER) for work in works) + sum(calls)


@pytest.mark.parametrize("overrides", [["moe.every=1"], ["moe.every=2", "comm=dtd", "model.kv_heads=2"]])
def test_the_fastest_choice_is_the_best_of_all_added_up_in_another_way(overrides: list[str]) -> None:
    config = served(job(*overrides, "parallel.world_size=4"), REQUEST)
    generation = Generation(config, REQUEST, CLUSTER)
    capacity = float(np.median([choice.bytes for choice in generation.search(np.inf).choices]))
    found = generation.search(capacity)
    sizes = [1, 2, 4]
    experts = [(width, expert) for width, expert in product(sizes, sizes) if width * expert <= 4]
    layer = generation.mixtures[0].experts
    best, fitting, beyond = None, 0, 0
    for tensor in sizes:
        layouts = [ParallelDegrees(4, tensor, expert, expert_tensor=width) for width, expert in experts]
        times = {(name, d): added_up(generation, name, d) for name in generation.tokens for d in layouts}
        phases = {key: generation.phase(*key) for key in times}
        for old, new in product(layouts, layouts):
            moved = sum(moved_elements([parameter], old, new) for parameter in layer.parameters())
            exchange = len(generation.mixtures) * exchange_seconds(2.0 * moved, CLUSTER)
            total = times["prefill", old] + 64 * times["decode", new] + exchange
            choice = generation.choice(phases["prefill", old], phases["decode", new])
            assert choice.seconds == pytest.approx(total, rel=1e-9)
            fitting, beyond = fitting + (choice.bytes <= capacity), beyond + (choice.bytes > capacity)
            if choice.bytes <= capacity and (best is None or total < best[0]):
                best = total, old, new
    assert best is not None
    assert (fitting, beyond) == (len(found.choices), found.too_large)
    assert fitting
    assert beyond
    winner = found.choices[0]
    assert (winner.prefill.degrees, winner.decode.degrees) == best[1:]
    assert winner.seconds == pytest.approx(best[0], rel=1e-9)


def test_impossible_layouts_are_counted_by_reason() -> None:
    config = served(job("model.heads=4", "moe.num_experts=4"), REQUEST)
    found = Found()
    layouts = list(Generation(config, REQUEST, CLUSTER).layouts(found))
    assert {degrees.tensor for possible in layouts for degrees in possible} == {1, 2, 4}
    assert {degrees.expert for possible in layouts for degrees in possible} == {1, 2, 4}
    assert found.refused["model.heads (4) is not divisible by parallel.tensor (8)"] == 10
    assert sum(found.refused.values()) == 10 + 3  # eight processes for four experts


def test_memory_of_a_choice_is_worked_out_by_hand() -> None:
    config = served(job("moe.every=1", "model.positions=rotary"), REQUEST)
    generation = Generation(config, REQUEST, CLUSTER)
    degrees = ParallelDegrees(8, 2, 8, expert_tensor=1)
    phase = generation.phase("prefill", degrees)
    assert generation.remembered(2) == 8 * 577 * 4 * 2 * 256 * 2  # texts, positions, layers, keys and values, bf16
    choice = generation.choice(phase, generation.phase("decode", degrees))
    assert choice.bytes == phase.weights + phase.activations + generation.remembered(2)
    other = ParallelDegrees(8, 2, 2, expert_tensor=4)
    change = generation.choice(phase, generation.phase("decode", other))
    # Four of eight experts, a quarter of their width each, with biases: of the result whole.
    layer = 4 * (2 * 512 * 256 + 256 + 512)
    assert change.switch.beside == layer * 2
    assert change.bytes - generation.remembered(2) >= change.decode.weights + layer * 2
    # From the host, a layer's new experts lie packed and unpacked beside the weights while the prefill computes.
    hidden = Generation(config, replace(REQUEST, int4=True, upload=1e15), CLUSTER)
    change = hidden.choice(phase, hidden.phase("decode", other))
    assert change.switch.way == "int4"
    beside = layer * (2 + 0.5 + 4 / 128)
    assert change.bytes == generation.remembered(2) + change.decode.weights + phase.activations + beside
    # Where that does not fit, an exchange may.
    exchange = hidden.choice(phase, hidden.phase("decode", other), change.bytes - 1)
    assert exchange.switch.way == "exchange"
    assert exchange.bytes < change.bytes
    assert hidden.choice(phase, hidden.phase("decode", other), 0.0).switch.way == "exchange"  # the nearest miss


PARAMETER = ParameterSpec("up", (4, 6, 8), divided={"expert": 0, "expert_tensor": 2}, mesh="expert")


@pytest.mark.parametrize("old", [(1, 4, 1), (2, 2, 2), (2, 1, 4), (1, 1, 1)])
@pytest.mark.parametrize("new", [(1, 2, 2), (4, 1, 4), (1, 4, 2), (1, 1, 1)])
def test_moves_put_every_element_where_it_is_needed_once(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    before, after = (ParallelDegrees(8, t, e, expert_tensor=w) for t, e, w in (old, new))
    whole = np.arange(4 * 6 * 8).reshape(4, 6, 8)

    def part(box: tuple[range, ...]) -> tuple[slice, ...]:
        return tuple(slice(extent.start, extent.stop) for extent in box)

    moves = moves_of(PARAMETER, before, after)
    for rank in range(8):
        needed = held(PARAMETER, after, rank)
        got = np.full(whole.shape, -1)
        for move in (move for move in moves if move.receiver == rank):
            sent = np.full(whole.shape, -1)
            own = part(held(PARAMETER, before, move.sender))
            sent[own] = whole[own]  # what the sender has
            assert (got[part(move.box)] == -1).all()
            got[part(move.box)] = sent[part(move.box)]
        assert (got[part(needed)] == whole[part(needed)]).all()
        assert (got >= 0).sum() == whole[part(needed)].size
        kept = [move.elements for move in moves if move.receiver == move.sender == rank]
        own = set(whole[part(held(PARAMETER, before, rank))].flat)
        assert sum(kept) == len(own & set(whole[part(needed)].flat))  # nobody sends what is there


def test_a_switch_is_worked_out_by_hand() -> None:
    # One expert whole in each of four processes, then a quarter of each: everyone gets 3/4 of 48 · 4 / 4 elements.
    before, after = ParallelDegrees(4, 1, 4), ParallelDegrees(4, 1, 1, expert_tensor=4)
    counts = moved_elements([PARAMETER], before, after)
    assert (counts == 12).all()
    (change,) = switches([PARAMETER], 3, before, after, torch.bfloat16, CLUSTER)
    link = CLUSTER.in_node
    assert link is not None
    assert change.way == "exchange"
    assert change.moved == 3 * 36 * 2
    assert change.seconds == pytest.approx(3 * (link.latency + 72 / (link.bandwidth * 0.69)))
    # INT4: 48 weights of half a byte, with 4 bytes for each 128, over 1 KB/s; reading these and writing bf16.
    packed = 48 * (0.5 + 4 / 128)
    _, slow = switches([PARAMETER], 3, before, after, torch.bfloat16, CLUSTER, upload=1e3, prefill_layer=1.0)
    assert slow.way == "int4"
    assert slow.seconds == 0.0
    _, barely = switches([PARAMETER], 3, before, after, torch.bfloat16, CLUSTER, upload=1e9, prefill_layer=0.0)
    written = (packed + 96) / (CLUSTER.memory_bandwidth * CLUSTER.efficiency.memory)
    assert barely.seconds == pytest.approx(3 * (packed / 1e9 + written))
    (same,) = switches([PARAMETER], 3, before, before, torch.bfloat16, CLUSTER)
    assert same.way == "none"


@pytest.mark.parametrize("world", [4, 8, 16, 32])
def test_an_even_exchange_takes_what_an_all_to_all_takes(world: int) -> None:
    each = np.full((world, world), 3e6)
    assert exchange_seconds(each, CLUSTER) == pytest.approx(
        collective_seconds("all_to_all", 3e6 * world, range(world), CLUSTER)
    )


@pytest.mark.parametrize("size", [1.3e9, 60e6])
def test_texts_that_do_not_fit_are_refused_with_the_largest_batch_that_would(size: float) -> None:
    config, request, small = job("moe.every=1"), ServeConfig(prompt=512, output=64, batch=4096), with_memory(size)
    with pytest.raises(UsageError, match=r"needs \d+\.\d+ GiB more .* keys and values .* batch=\d+ would fit") as error:
        plan_generation(config, request, "small", small, 0.0)
    most = int(str(error.value).split("would fit")[0].split("batch=")[1])
    generation = Generation(served(config, request), request, small)
    assert any(choice.same for choice in generation.of(most).search(size).choices)
    assert not any(choice.same for choice in generation.of(most + 1).search(size).choices)


def test_not_even_one_text_is_said_only_if_that_is_so() -> None:
    request, small = ServeConfig(prompt=512, output=64, batch=4096), with_memory(2e6)
    with pytest.raises(UsageError, match="not even one text fits in any layout"):
        plan_generation(job(), request, "small", small, 0.0)
    assert not Generation(served(job(), request), request, small).of(1).search(2e6).choices


def with_memory(size: float) -> ClusterConfig:
    return replace(CLUSTER, memory_bytes=size)


@pytest.mark.parametrize(
    ("overrides", "request_", "message"),
    [
        ([], ServeConfig(prompt=5), "prompt and output say how long texts are"),
        ([], ServeConfig(prompt=1000, output=25, batch=1), "are 1025 tokens, but the model has .*=1024 positions"),
        (["moe.gating=expert_choice"], REQUEST, "the job has moe.gating=expert_choice, which chooses"),
        (["model.heads=5"], REQUEST, "model.hidden"),
    ],
)
def test_what_cannot_be_planned_is_refused(overrides: list[str], request_: ServeConfig, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        served(job(*overrides), request_)


def test_the_command_line_needs_no_names_of_sections() -> None:
    typed = ["phase=generate", "prompt=8", "output=4", "batch=2", "int4=true", "upload=1e9", "world_size=4", "seed=1"]
    assert prepared([*typed, "trainer=gpu"]) == [
        *("plan.phase=generate", "serve.prompt=8", "serve.output=4", "serve.batch=2", "serve.int4=true"),
        *("serve.upload=1e9", "parallel.world_size=4", "seed=1", "trainer=gpu"),
    ]


@pytest.mark.parametrize(
    ("phase", "plan", "serve", "override", "message"),
    [
        ("train", {}, {"prompt": 8}, "", "serve.prompt=8 does nothing .* to phase=generate and phase=disaggregated"),
        ("generate", {"largest": True}, {}, "", "plan.largest=True does nothing .* belongs to phase=train"),
        ("generate", {"simulate": 3}, {}, "", "plan.simulate=3 does nothing with phase=generate"),
        ("generate", {}, {"latency": 0.1}, "", "serve.latency=0.1 does nothing .* belongs to phase=disaggregated"),
        ("generate", {}, {"upload": 1e9}, "", r"upload=1e\+09 does nothing without int4=true"),
        ("generate", {}, {}, "parallel.tensor=4", "parallel.tensor=4 does nothing .* it takes world_size"),
        ("disaggregated", {}, {"batch": 8}, "", "serve.batch=8 does nothing .* belongs to phase=generate"),
        ("disaggregated", {}, {"int4": True}, "", "serve.int4=True does nothing"),
    ],
)
def test_values_that_a_phase_would_not_look_at_are_refused(
    phase: str, plan: dict[str, int], serve: dict[str, int], override: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_of_phase(PlanConfig(phase=phase, **plan), ServeConfig(**serve), [override])  # type: ignore[arg-type]


def test_values_of_a_phase_are_taken_and_each_belongs_to_one() -> None:
    check_of_phase(PlanConfig(simulate=3, largest=True, runs=["run"]), ServeConfig(), ["parallel.tensor=4"])
    generate = ServeConfig(prompt=8, output=4, batch=2, int4=True, upload=1e9)
    check_of_phase(
        PlanConfig(reserve_gib=0.5, phase="generate"), generate, ["parallel.world_size=4", "parallel=single"]
    )
    pools = ServeConfig(8, 4, experts_on="summit", latency=1.0, price=2.0, expert_price=3.0, expert_gpus=2)
    check_of_phase(PlanConfig(phase="disaggregated"), replace(pools, attention_gpus=2), [])


def test_what_runs_have_taught_is_said_of_inference_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    config = PlanningConfig(plan=PlanConfig(phase="generate"), serve=REQUEST)
    job_on_two = job("parallel.world_size=2", "model.layers=2")
    inference(config, job_on_two, "dgx_a100", CLUSTER, ["one run is little"], Spread(3.0, "what the runs took"))
    text = capsys.readouterr().out
    assert "Warning: one run is little" in text
    assert "by what the runs took" in text


def test_the_plan_says_that_int4_changes_weights_and_names_misses_and_the_switch() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    config = with_values(job("moe.every=1"), {"model.layers": 2})
    request = ServeConfig(prompt=512, output=65, batch=32, int4=True)
    tight = with_memory(150e6)
    best = plan_generation(config, request, "dgx_a100", tight, 0.0, console=console)
    text = console.export_text()
    assert "int4=true changes weights" in text
    assert "the nearest miss, by" in text
    moved = best.switch.seconds > 0
    assert ("The switch adds" in text, "No switch: with another layout" in text) == (moved, not moved)
    assert f"{best.seconds:.4g}" in text
    console = Console(width=120, record=True, file=io.StringIO())
    plan_generation(config, REQUEST, "dgx_a100", tight, 0.0, console=console)
    assert "int4" not in console.export_text()
