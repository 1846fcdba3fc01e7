"""A simulated rank communicates, keeps and computes what a real one does, whatever the size of the world."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from tedlab._compat.simulation import FakeTensorMode
from tedlab.callbacks.memory import _held_bytes
from tedlab.certify import Certificate, certify
from tedlab.comm import Collective, Collectives
from tedlab.comm.ledger import differences
from tedlab.commands.simulate import SimulateConfig, task
from tedlab.config import SimulationConfig, TrainConfig, with_values
from tedlab.degrees import ParallelDegrees, parallel_degrees
from tedlab.errors import UsageError
from tedlab.moe.grouped import one_by_one
from tedlab.nn.ids import unchecked
from tedlab.predict.cluster import Dispatch, Kernels, MeasuredWait, load_cluster
from tedlab.predict.cost import collective_seconds, placement_of
from tedlab.predict.flops import forward_flops
from tedlab.predict.sim import Simulation, simulate
from tedlab.predict.sim.memory import StorageTracker
from tedlab.predict.sim.meter import HIDDEN, KERNELS, MATRICES, Meter
from tedlab.predict.sim.ranks import kinds_of_ranks
from tedlab.predict.sim.show import _memory_table
from tedlab.predict.sim.simulation import Batches
from tedlab.predict.sim.threads import MOST_THREADS, run_in_threads
from tedlab.predict.sim.world import OneOfMany, fake_process_group
from tedlab.predict.volumes import ClosedForm, predict
from tedlab.run import language_model, strategy_of
from tedlab.spec import Work
from tedlab.strategy import TEDStrategy
from tedlab.validate import complete_simulated
from tests.certify.runs import composed
from tests.compare.sweep import compare_command
from tests.moved import Moved
from tests.pool import WorkerPool
from tests.selection import asked_of

SMALL = ["model.layers=2", "model.hidden=64", "model.heads=4", "model.ffn=128", "model.sequence_length=32"]
SMALL += ["model.vocab_size=512", "moe.num_experts=16", "parallel.tensor=4", "parallel.expert=16"]
ALONE = [*SMALL, "parallel=single", "parallel.tensor=1", "parallel.expert=1", "data.batch_size=2"]
ALONE += ["data.micro_batch_size=2"]
WIDE = [*SMALL, "model.layers=1", "model.hidden=1024", "model.ffn=4096", "moe.num_experts=0"]
WIDE += ["parallel=dp2", "data.batch_size=4", "parallel.tensor=1", "parallel.expert=1", "data.micro_batch_size=2"]
WORLD = [*SMALL, "parallel.world_size=128", "data.batch_size=192", "data.micro_batch_size=2"]  # 3 micro-batches


def checked(*overrides: str) -> TrainConfig:
    return complete_simulated(composed(*overrides))


@contextmanager
def out_of_the_pools_group() -> Iterator[None]:
    """In a worker: the process is part of no group meanwhile."""
    dist.destroy_process_group()
    try:
        yield
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def simulated(config: TrainConfig, *ranks: int) -> list[Simulation]:
    with out_of_the_pools_group():
        return [simulate(config, load_cluster("summit"), rank) for rank in ranks]


@cache
def here(*overrides: str, cluster: str = "summit", rank: int = 0) -> Simulation:
    """In this process, once: the first that a process simulates takes twice as long as those after it.

    Of several ranks: DTensor remembers meshes, and those of other tests in this process have one.
    """
    return simulate(checked(*overrides), load_cluster(cluster), rank)


@pytest.fixture(scope="module")
def of_128_ranks(pool: WorkerPool, request: pytest.FixtureRequest) -> dict[tuple[str, ...], Simulation]:
    """With all toggles that this session asks for, in one process: the first there takes longest."""
    asked = [tuple(cell["toggles"]) for cell in asked_of(request)]
    found = pool.run_each(1, simulated, [(checked(*WORLD, *toggles), 0) for toggles in asked], timeout=280)
    return {toggles: simulation for toggles, ((simulation,),) in zip(asked, found, strict=True)}


TOGGLES = [
    ["optim.overlap=true"],
    ["model.recompute.granularity=block", "parallel.sequence=true", "moe.top_k=2", "trainer.precision=bf16-true"],
    ["moe.balance.scope=global_batch", "moe.dispatch=dropless", "moe.top_k=2", "moe.router.noise=gumbel"],
    [
        *("optim.groups=[{pattern: '*.experts.*', lr_factor: 0.5}, {pattern: '*', frozen: true}]", "comm=ted"),
        *("model.recompute.granularity=block", "model.recompute.early_stop=false", "optim.tile=fused"),
    ],
    ["parallel.expert_tensor=1", "parallel.order=expert_data", "moe.slice=tokens", "moe.top_k=2"],
]
ALIKE = [  # each has what others have as well, if not together
    ["model.recompute.granularity=block", "model.recompute.early_stop=false", "comm=ted"],
    [
        *("model.recompute.granularity=block", "comm=ted_fused", "comm.cac=shard"),
        *("trainer.precision=16-mixed", "trainer=gpu"),
    ],
]
MORE_TOGGLES = [
    ["moe.gating=deepspeed_top2", "moe.top_k=2", "optim.zero=false", "optim.tile=null", "data.batch_size=64"],
    [
        "moe.balance.scope=sequence",
        "parallel.sequence=true",
        "moe.router.bias_update=sign",
        "moe.router.scoring=sigmoid",
        "moe.router.expert_groups=4",
        "moe.router.chosen_groups=2",
    ],
    ["moe.gating=expert_choice", "trainer.precision=16-mixed", "trainer=gpu"],
    [
        *("parallel.expert_tensor=2", "parallel.expert=8", "comm=ted_fused", "comm.cac=shard"),
        *("model.recompute.granularity=block", "trainer.precision=bf16-true"),
    ],
    ["parallel.expert_tensor=8", "parallel.expert=4", "moe.dispatch=packed", "moe.capacity_factor=1"],
    ["moe=dense", "parallel.expert=1", "optim.tile=fused", "trainer.precision=16-true", "data.batch_size=128"],
]


def test_ci_has_every_toggle() -> None:
    assert {toggle for toggles in ALIKE for toggle in toggles} <= {t for ts in TOGGLES + MORE_TOGGLES for t in ts}


@pytest.mark.parametrize(
    "toggles",
    [
        *TOGGLES,
        *(pytest.param(toggles, marks=pytest.mark.slow) for toggles in MORE_TOGGLES),
        *(pytest.param(toggles, marks=pytest.mark.exhaustive) for toggles in ALIKE),
    ],
    ids=lambda toggles: ",".join(toggles),
)
def test_the_ledger_of_128_ranks_is_the_closed_form(
    of_128_ranks: dict[tuple[str, ...], Simulation], toggles: list[str]
) -> None:
    simulation = of_128_ranks[tuple(toggles)]
    assert simulation.differences == {}
    assert len({entry.phase for entry in simulation.ledger}) >= 3
    assert all(count.seconds > 0 for count in simulation.ledger.values())
    overlapped = "optim.overlap=true" in toggles
    assert (simulation.seconds.get(("optimizer", HIDDEN), 0.0) < 0) == overlapped


def test_what_shared_experts_hide_is_what_the_step_becomes_shorter_by() -> None:
    """In each layer, forward: no more than the first projections, and no more than the exchange they run beside."""
    overrides = [*WORLD, "moe.shared.experts=1", "moe.shared.ffn=256", "data.batch_size=64"]
    off, on = (here(*overrides, f"comm.overlap_shared={overlapped}") for overlapped in ("false", "true"))
    assert on.differences == {}
    assert not off.hidden
    assert {entry.tag for entry in on.hidden} == {"dispatch.all_to_all", "combine.all_to_all"}
    assert {entry.phase for entry in on.hidden} == {"forward", "backward"}
    assert all(0 < seconds <= on.ledger[entry].seconds for entry, seconds in on.hidden.items())
    assert on.step_seconds == pytest.approx(off.step_seconds - sum(on.hidden.values()))
    assert differences(on.ledger, off.ledger) == {}
    ends = [max(s.end for s in run.spans) - min(s.start for s in run.spans) for run in (off, on)]
    assert ends == pytest.approx([off.step_seconds, on.step_seconds])  # the makespan


def test_chunks_of_slots_and_of_rows_are_exchanged_while_others_are_computed() -> None:
    """In both passes; as many bytes travel as without, in twice as many calls."""
    kinds: list[list[str]] = [[], ["moe.dispatch=dropless", "comm=dtd"]]
    for kind in kinds:
        off, on = (here(*WORLD, "data.batch_size=64", f"comm.chunks={chunks}", *kind) for chunks in (1, 2))
        assert on.differences == {}
        exchanges = {e for e in on.ledger if e.tag in ("dispatch.all_to_all", "combine.all_to_all")}
        assert on.hidden.keys() == exchanges
        assert {e.phase for e in exchanges} == {"forward", "backward"}
        for entry in exchanges:
            assert 0 < on.hidden[entry] < on.ledger[entry].seconds
            assert on.ledger[entry].calls == 2 * off.ledger[entry].calls
            assert on.ledger[entry].payload_bytes == off.ledger[entry].payload_bytes


@pytest.mark.parametrize("micro_batches", [2, 5])
def test_a_pass_hides_the_exchanges_of_the_other_beside_it(micro_batches: int) -> None:
    """But for the first forward and the last backward pass, which are alone; nothing else changes but memory."""
    overrides = [*WORLD, f"data.batch_size={64 * micro_batches}", "moe.every=1", "comm=dtd"]
    config, cluster = checked(*overrides), load_cluster("summit")
    off, on = (simulate(with_values(config, {"comm.interleave": on}), cluster) for on in (False, True))
    assert on.differences == {}
    assert differences(on.ledger, off.ledger) == {}
    assert on.flops == off.flops
    computing = [sum(s for (_, cause), s in run.seconds.items() if cause in (MATRICES, KERNELS)) for run in (off, on)]
    assert computing[1] == pytest.approx(computing[0], rel=1e-3)
    exchanges = {e for e in on.ledger if e.tag in ("dispatch.all_to_all", "combine.all_to_all")}
    assert on.hidden.keys() == exchanges
    assert {e.phase for e in exchanges} == {"forward", "backward"}
    hidden = sum(on.hidden.values())
    assert on.step_seconds == pytest.approx(off.step_seconds - hidden)
    alone = sum(on.ledger[entry].seconds for entry in exchanges)
    assert 0.1 * alone < hidden <= (micro_batches - 1) / micro_batches * alone * (1 + 1e-9)
    assert sum(on.memory.at_peak().values()) > sum(off.memory.at_peak().values())


@pytest.mark.slow
def test_any_rank_may_be_simulated_and_layouts_are_symmetric() -> None:
    first, *others = (here(*WORLD, rank=rank) for rank in (0, 1, 66, 127))
    for other in others:
        assert differences(first.ledger, other.ledger) == {}
        assert other.flops == first.flops
        assert other.memory.at_peak() == first.memory.at_peak()


def test_flops_are_those_of_the_formula_when_every_slot_is_used() -> None:
    overrides = [*WORLD, "moe.capacity_factor=1", "moe.capacity_multiple=1", "model.recompute.granularity=block"]
    config = checked(*overrides)
    flops = here(*overrides).flops
    tokens = config.data.batch_size * config.model.sequence_length / 32  # of a data rank
    expected = forward_flops(config.model, config.moe)
    routers = expected.pop("routers")  # which each tensor rank computes whole
    assert flops["forward"] == pytest.approx(tokens * (sum(expected.values()) / 4 + routers))
    assert flops["recompute"] < flops["forward"] < flops["backward"]


@pytest.mark.exhaustive
def test_pricing_again_is_simulating_on_that_cluster() -> None:
    overrides = [*WORLD, "comm=ted", "model.recompute.granularity=block", "trainer.precision=16-true"]
    first, there = here(*overrides), here(*overrides, cluster="dgx_h100")
    assert first.seconds_on(load_cluster("summit")) == pytest.approx(first.seconds)
    assert first.seconds_on(load_cluster("dgx_h100")) == pytest.approx(there.seconds)
    with pytest.raises(ValueError, match=r"optim\.overlap"):
        here(*WORLD, "optim.overlap=true").seconds_on(load_cluster("summit"))
    with pytest.raises(ValueError, match="dispatch"):
        first.seconds_on(replace(load_cluster("summit"), kernels=Kernels(Dispatch(forward=1e-5))))


def test_the_host_holds_up_each_phase_by_its_own_dispatch(pool: WorkerPool) -> None:
    config = checked(*ALONE, "model.recompute.granularity=block")
    (simulation,) = pool.run(1, held_up, config, Dispatch(forward=1.0, backward=10.0, optimizer=100.0))
    operations = Counter[str]()
    for (phase, _), times in simulation.kernels.items():
        operations[phase] += times
    for phase, dispatch in (("forward", 1.0), ("recompute", 1.0), ("backward", 10.0), ("optimizer", 100.0)):
        taken = sum(seconds for (when, _), seconds in simulation.seconds.items() if when == phase)
        assert taken == pytest.approx(dispatch * operations[phase], rel=1e-3)


@pytest.mark.parametrize(("views", "calls"), [(True, 4), (False, 1)])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_views_take_the_host_s_time_where_they_are_counted(views: bool, calls: int, asynchronous: bool) -> None:
    """Two views, a sum, and a view of it: a GPU is done when the host has asked for the sum."""
    kernels = Kernels(Dispatch(optimizer=1.0, views=views), asynchronous)
    meter = Meter(replace(load_cluster("one_h200"), kernels=kernels), {}, StorageTracker(lambda: 0), lambda: None)
    x_AB = torch.ones(4, 6)
    meter.start(0)
    with meter:
        total = x_AB.view(24) + x_AB.view(24)
        total.view(6, 4)
    done = calls - views if asynchronous else calls  # the last is a view, which only a host that computes does itself
    assert meter.memory.now == pytest.approx(done)
    assert sum(meter.parts[0].seconds.values()) == pytest.approx(done)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_views_within_compiled_code_and_the_results_of_collectives_are_no_operations_of_a_gpu_s_host(
    asynchronous: bool,
) -> None:
    kernels = Kernels(Dispatch(optimizer=1.0, views=True), asynchronous)
    meter = Meter(replace(load_cluster("one_h200"), kernels=kernels), {}, StorageTracker(lambda: 0), lambda: None)
    with FakeTensorMode():
        large = torch.ones(1 << 23)  # whose reduction maps new memory
        meter.start(0)
        with meter:
            meter.compile(True)
            large.view(2, -1)
            meter.compile(False)
            assert meter.memory.now == meter._host == 0
            torch.ops._c10d_functional.all_reduce(large, "sum", "0")
    assert meter._host == pytest.approx(0 if asynchronous else 1)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_host_that_does_not_compute_takes_its_time_to_launch_collectives(asynchronous: bool) -> None:
    kernels = Kernels(Dispatch(collective=1.0), asynchronous)
    cluster = replace(load_cluster("summit"), kernels=kernels)
    meter = Meter(cluster, {"tensor": range(2)}, StorageTracker(lambda: 0), lambda: None)
    meter.start(0)
    size = torch.Size([1 << 20])
    for _ in range(3):
        call = Collective("all_reduce", "tensor", 2, "forward", "attention.reduce", size, torch.float32)
        meter.on_collective(call, "start")
        meter.on_collective(call, "end")
    alone = collective_seconds("all_reduce", 4 << 20, range(2), cluster)
    # Each but the last hides behind the launch of the next.
    assert meter.memory.now == pytest.approx(3 + alone if asynchronous else 3 * alone)


@pytest.mark.slow
def test_the_host_waits_for_the_device_where_it_reads_the_norm_but_for_no_step_count(
    pool: WorkerPool,
) -> None:
    config = checked(*ALONE, "optim.tile=8000")
    (slow,), (fast,) = pool.run_each(1, held_up, [(config, Dispatch(optimizer=each)) for each in (1e-9, 0.0)])
    tiles = slow.about["parameters/total"] / 8000
    assert 0 < slow.step_seconds - fast.step_seconds < tiles * 1e-9 / 2  # the rest is hidden behind a slower device


def held_up(config: TrainConfig, dispatch: Dispatch) -> Simulation:
    with out_of_the_pools_group():
        return simulate(config, replace(load_cluster("one_h200"), kernels=Kernels(dispatch)))


@pytest.mark.slow
def test_every_collective_waits_for_the_slowest_of_its_group() -> None:
    clusters = (replace(load_cluster("summit"), waits=[MeasuredWait(4, 1, *given)]) for given in ((1, 0), (0, 1)))
    late, share = (simulate(checked(*WORLD), cluster) for cluster in clusters)
    sooner = here(*WORLD)
    for entry, count in sooner.ledger.items():
        waits = count.calls if entry.kind in ("tensor", "expert_tensor") else 0  # the only groups of 4 on one node
        assert late.ledger[entry].seconds == pytest.approx(count.seconds + waits, rel=1e-6)
    assert share.step_seconds < 2 * sooner.step_seconds  # nothing is waited for twice


def test_large_results_of_collectives_are_fresh_memory_but_not_what_is_given_to_them() -> None:
    simulations = (here(*WIDE, f"optim.zero={zero}", cluster="this_machine") for zero in ("false", "true"))
    whole, sharded = ([work.fresh for _, work in it.kernels if not work.bytes] for it in simulations)
    assert [size > 2**25 for size in whole] == [True]  # the sum of a bucket's gradients
    assert sharded == []  # half of it is less than 32 MiB, and parameters are gathered into a bucket that is there


@pytest.mark.slow
def test_16384_ranks_take_no_longer_than_128(pool: WorkerPool) -> None:
    seconds = {world: pool.run(1, timed, checked(*WORLD, *larger(world)), world - 5)[0] for world in (128, 16384)}
    assert seconds[16384] < 2 * seconds[128] + 1


def larger(world: int) -> list[str]:
    return [f"parallel.world_size={world}", f"data.batch_size={world}", "data.micro_batch_size=1"]


def timed(config: TrainConfig, rank: int) -> float:
    began = time.perf_counter()
    assert simulated(config, rank)[0].differences == {}
    return time.perf_counter() - began


# ---- memory --------------------------------------------------------------------------------------------------------

MEDIUM = ["model.layers=4", "model.hidden=128", "model.sequence_length=256", "model.vocab_size=1024"]
MEDIUM += ["parallel=single", "data.batch_size=12", "data.micro_batch_size=4"]
MANY = ["parallel.world_size=128", "parallel.tensor=4", "parallel.expert=16", "moe.num_experts=16"]
MANY += ["data.batch_size=256"]


class Allocations(Callback):
    """What the allocator of the second step was asked for, from torch's profiler, on top of what training keeps."""

    def __init__(self) -> None:
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.peak = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == trainer.accumulate_grad_batches:
            held = _held_bytes(trainer.strategy)  # type: ignore[arg-type]
            self.peak = held["parameters"] + held["optimizer"]
            self.profile.start()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.profile.stop()
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        assert most > 0
        self.peak += most


class Watched(TEDStrategy):
    """Lists what operations of forward passes do."""

    forward: ClassVar[Moved]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.forward:
            return super().training_step(*args, **kwargs)


class Step(NamedTuple):
    """What one rank allocated at most in a step, and what the operations of its forward passes did."""

    peak: int
    forward: dict[Work, float]


def both(config: TrainConfig) -> tuple[Step, Step]:
    """Really, and simulated."""
    with out_of_the_pools_group(), fake_process_group(config.parallel.world_size, 0):
        real = really(config)
    simulation = simulated(config, 0)[0]
    forward = {work: number for (phase, work), number in simulation.kernels.items() if phase == "forward"}
    return real, Step(sum(simulation.memory.at_peak().values()), forward)


def really(config: TrainConfig) -> Step:
    """By the first rank in two optimizer steps of TEDStrategy with real tensors; only others' answers are missing."""
    allocations, Watched.forward = Allocations(), Moved()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=config.parallel.world_size,
        plugins=[OneOfMany(config.parallel.world_size, 0)],
        # What nobody answers may hold anything, NaN too.
        strategy=strategy_of(config, Watched, stop_on_nonfinite=False),
        precision=config.trainer["precision"],
        max_steps=2,
        gradient_clip_val=config.trainer["gradient_clip_val"],
        accumulate_grad_batches=config.trainer["accumulate_grad_batches"],
        callbacks=[allocations],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    with unchecked(), one_by_one():  # as in a simulation, whose token ids have no values to check
        trainer.fit(language_model(config), Batches(config))
    return Step(allocations.peak, {work: number / 2 for work, number in Watched.forward.works.items()})


PEAKS = {
    "accumulating": [],
    "bf16": ["trainer.precision=bf16-true", "optim.tile=null", "data.batch_size=4"],
    "optimizer_spike": ["optim.tile=null", "data.batch_size=1", "data.micro_batch_size=1", "moe.num_experts=16"],
    "dropless": ["moe.dispatch=dropless", "moe.top_k=2", "trainer.precision=bf16-true", "data.micro_batch_size=2"],
    "ted": [*MANY, "comm=ted", "model.recompute.granularity=block"],
    "sequence": [*MANY, "comm.cac=shard", "parallel.sequence=true", "model.recompute.granularity=block"],
    "overlap": [*MANY, "comm=dtd", "optim.overlap=true"],
}


_MARKS = {"ted": [], "dropless": [pytest.mark.slow], "sequence": [pytest.mark.slow]}  # CI leaves the others out


@pytest.mark.parametrize(
    "toggles",
    [
        pytest.param(toggles, id=name, marks=_MARKS.get(name, [pytest.mark.exhaustive]))
        for name, toggles in PEAKS.items()
    ],
)
def test_a_real_run_allocates_and_computes_what_is_simulated(pool: WorkerPool, toggles: list[str]) -> None:
    real, predicted = pool.run(1, both, checked(*MEDIUM, *toggles))[0]
    assert predicted.peak == pytest.approx(real.peak, rel=0.05)
    # Where experts have no capacity, their products are of the rows that were chosen, which are as many in all.
    routed = "moe.dispatch=dropless" in toggles
    assert in_all(predicted.forward) == in_all(real.forward)
    assert listed(predicted.forward, routed) == listed(real.forward, routed)


def in_all(forward: dict[Work, float]) -> float:
    return sum(work.flops * number for work, number in forward.items())


def listed(forward: dict[Work, float], routed: bool) -> dict[Work, float]:
    return {work: number for work, number in forward.items() if not (routed and work.flops)}


def test_categories_at_the_peak_are_what_training_keeps() -> None:
    overrides = [*WORLD, "trainer.precision=16-true", "model.recompute.granularity=block", "comm=ted"]
    timeline = here(*overrides).memory
    config, most = checked(*overrides), {category: int(values.max()) for category, values in timeline.held.items()}
    assert all((values >= 0).all() for values in timeline.held.values())
    assert sum(timeline.at_peak().values()) == timeline.total.max()
    assert most["gradients"] >= most["parameters"] > 0
    form = ClosedForm(config)
    assert most["stash"] == sum(form.kept_bytes(block, config.comm.cac) for block in range(2)) > 0


# ---- what is left behind -------------------------------------------------------------------------------------------


def asked(config: TrainConfig, cluster: str | None = "summit", **sim: Any) -> SimulateConfig:
    """What ``tedlab simulate cluster=… sim.…=…`` composes of a job."""
    on = None if cluster is None else load_cluster(cluster)
    job = {**vars(config), "choices": {"cluster": cluster}}
    return SimulateConfig(**job, cluster=on, sim=SimulationConfig(**sim))


def command(config: SimulateConfig, missing: str | None) -> None:
    """The command, in a worker; the closed form forgets the collectives of one tag."""
    with pytest.MonkeyPatch.context() as patch:
        expected = {entry: count for entry, count in predict(config).items() if entry.tag != missing}
        patch.setattr("tedlab.predict.sim.simulation.predict", lambda *_: expected)
        with out_of_the_pools_group():
            task(config)


@pytest.mark.slow
def test_compare_reads_simulations_and_marks_their_times(
    pool: WorkerPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("none", "dtd"):
        config = checked(*WORLD, f"comm={name}", f"output_dir={tmp_path / name}")
        pool.run(1, command, asked(config, rank=9), None)
        for picture in ("memory.png", "time.png", "timeline.png"):
            assert (tmp_path / name / picture).read_bytes().startswith(b"\x89PNG")
    compare_command(str(tmp_path / "none"), str(tmp_path / "dtd"), "by=comm.dtd,sim.rank")
    text = capsys.readouterr().out
    assert "† Times of none, dtd were simulated (summit); none was measured." in text
    assert "step time" in text


@pytest.mark.slow
def test_ranks_are_of_one_kind_if_their_predictions_are_equal() -> None:
    """On nodes of six GPUs tensor groups of four lie differently; on nodes of eight they do not."""
    config = checked(*WORLD)
    degrees = parallel_degrees(config.parallel)
    assert [*kinds_of_ranks(degrees, load_cluster("thetagpu"))] == [0]
    kinds = kinds_of_ranks(degrees, load_cluster("summit"))
    assert sorted(rank for ranks in kinds.values() for rank in ranks) == [*range(128)]
    assert len(kinds) == 4
    some = [(kind, rank) for kind, ranks in kinds.items() for rank in (kind, ranks[-1])]
    found = [here(*WORLD, rank=rank) for _, rank in some]
    seconds = {kind: {one.step_seconds for (k, _), one in zip(some, found, strict=True) if k == kind} for kind in kinds}
    assert all(len(equal) == 1 for equal in seconds.values())
    assert max(seconds[0]) < max(seconds[4])


@pytest.mark.parametrize(
    "degrees",
    [
        *(ParallelDegrees(120, 4, 2), ParallelDegrees(128, 4, 16), ParallelDegrees(36, 12), ParallelDegrees(64, 2, 16)),
        *(ParallelDegrees(72, 4, 2, expert_tensor=1), ParallelDegrees(48, 4, 2, expert_tensor=3)),
        *(ParallelDegrees(96, 4, 8, expert_tensor=1, order="expert_data"), ParallelDegrees(64, 1, 2, expert_tensor=4)),
    ],
    ids=str,
)
def test_ranks_of_a_kind_lie_alike_and_others_do_not(degrees: ParallelDegrees) -> None:
    world, cluster = degrees.world_size, load_cluster("summit")
    by_place: dict[tuple[object, ...], list[int]] = {}
    for rank in range(world):
        places = tuple(placement_of(group, cluster.gpus_per_node) for group in degrees.groups(rank).values())
        by_place.setdefault(places, []).append(rank)
    assert kinds_of_ranks(degrees, cluster) == {ranks[0]: ranks for ranks in by_place.values()}


@pytest.mark.slow
def test_every_rank_is_reported_and_the_slowest_is_shown(pool: WorkerPool, tmp_path: Path) -> None:
    config = checked(*WORLD, f"output_dir={tmp_path}", "data.batch_size=64")
    pool.run(1, command, asked(config, rank="all"), None)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["memory/peak_bytes_by_rank"]) == len(summary["sim/step_time_s_by_rank"]) == 128
    assert summary["perf/step_time_s"] == max(summary["sim/step_time_s_by_rank"])
    assert len(set(summary["sim/step_time_s_by_rank"])) > 1


# ---- real numbers --------------------------------------------------------------------------------------------------


def in_threads(config: TrainConfig, patch: str) -> Certificate:
    with out_of_the_pools_group(), pytest.MonkeyPatch.context() as monkeypatch:
        if patch == "mean instead of sum":
            plain = Collectives.start_reduce_scatter
            monkeypatch.setattr(
                Collectives,
                "start_reduce_scatter",
                lambda self, x, kind, **k: plain(self, x / (self.size(kind) if kind == "data" else 1), kind, **k),
            )
        return certify(config, run_in_threads, continuations=(), most_processes=MOST_THREADS)


THREADED = ["parallel.tensor=2", "parallel.expert=2", "comm=ted", "model.recompute.granularity=block"]
THREADED += ["data.batch_size=16", "data.micro_batch_size=1"]


@pytest.mark.skipif(torch.__version__ < "2.13", reason="threads crash in older versions, and the command says so")
@pytest.mark.parametrize(("world", "patch"), [pytest.param(8, "", marks=pytest.mark.slow), (4, "mean instead of sum")])
def test_all_ranks_as_threads_of_one_process_equal_one_process(pool: WorkerPool, world: int, patch: str) -> None:
    certificate = pool.run(1, in_threads, composed(*THREADED, f"parallel.world_size={world}"), patch)[0]
    assert certificate.layout.startswith(f"{world} processes: tensor 2 × expert 2")
    assert certificate.ok == (not patch)


def test_a_rank_that_fails_ends_the_others_with_its_traceback(pool: WorkerPool) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2 failed(.|\n)*rank one has had enough"):
        pool.run(1, failing, composed("parallel.world_size=2"), timeout=30)


def failing(config: TrainConfig) -> None:
    with out_of_the_pools_group():
        run_in_threads(fails_in_rank_one, config)


def fails_in_rank_one(config: TrainConfig) -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one has had enough")
    dist.barrier()


def test_a_collective_that_the_closed_form_does_not_have_fails_the_command(pool: WorkerPool, tmp_path: Path) -> None:
    config = checked(*WORLD, f"output_dir={tmp_path}")
    with pytest.raises(AssertionError, match="ledger is not what the closed form says"):
        pool.run(1, command, asked(config), "attention.reduce")


# ---- what the user gets wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "sim", "overrides", "said"),
    [
        (None, {}, [], ["cluster=NAME", "summit"]),
        ("summit", {"rank": 128}, WORLD, ["sim.rank=128 is no rank", "0 to 127"]),
        ("summit", {"rank": -1}, WORLD, ["sim.rank=-1", "0 to", "stages"]),
        (None, {"values": "true"}, WORLD, ["sim.values=true", "fake", "real"]),
        (None, {"values": "real", "rank": 3}, WORLD, ["sim.rank", "sim.values=real"]),
        ("one_h200", {}, WORLD, ["no rank 127", "one node of 1"]),
        ("summit", {}, [*WORLD, "parallel.world_size=130"], ["4×16 = 64", "world size 130", "192"]),
        ("summit", {}, [*WORLD, "data.batch_size=17"], ["data.batch_size (17)", "2×32"]),
    ],
)
def test_a_mistake_is_named_with_what_would_do(
    cluster: str | None, sim: dict[str, Any], overrides: list[str], said: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        task(asked(composed(*overrides), cluster, **sim))
    assert all(text in str(error.value) for text in said), str(error.value)


def test_what_does_not_fit_is_said_with_by_how_much() -> None:
    cluster = load_cluster("summit")
    for peak, said in ((cluster.memory_bytes / 2, "50% of a GPU's 15.8 GiB"), (20 * 2**30, "not fit: 4.2 GiB more")):
        assert said in str(_memory_table({"memory/peak_bytes": peak}, cluster).caption)


def test_without_a_tokenizer_the_vocabulary_is_that_of_gpt2() -> None:
    assert checked(*WORLD, "model.vocab_size=null").model.vocab_size == 50304
