"""Predicted against measured: step time and communication after calibration, and peak memory.

    python -m benchmarks.truth                  CPU processes over gloo: 2, 4 and 8 of them
    python -m benchmarks.truth processes=1,2    other numbers of them
    python -m benchmarks.truth device=cuda      one GPU; peak memory also of a rank of 128

``out=FILE.json`` and ``rounds=N`` (of a few steps of every configuration, in turn) have defaults. Calibration uses none
of these configurations. What could not be measured is in the file with its traceback.
"""

import gc
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import hydra
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from benchmarks.surroundings import surroundings
from tedlab.callbacks import CommunicationLedger
from tedlab.callbacks.memory import _held_bytes
from tedlab.cli import CONF
from tedlab.comm import TRAINING_PHASES
from tedlab.comm.ledger import Totals, summed
from tedlab.config import CalibrateConfig, TrainConfig, with_values
from tedlab.errors import UsageError
from tedlab.launch.launcher import launch
from tedlab.predict.calibrate import calibrate
from tedlab.predict.cluster import ClusterConfig, load_cluster
from tedlab.predict.sim import simulate
from tedlab.predict.sim.simulation import Batches
from tedlab.predict.sim.world import OneOfMany, fake_process_group
from tedlab.run import language_model, quieten, strategy_of
from tedlab.validate import complete_simulated

_RESULTS = Path(__file__).parent / "results"
_STEPS = {"cpu": 3, "cuda": 6}  # timed in a round, after one that is not
_ROUNDS = {"cpu": 2, "cuda": 1}  # a GPU has nothing else to do, and a run is short of its time
_MEASURED = ["output_dir=unused", "choices={}", "logger=none", "comm.ledger.time=true"]
_PARTS = ("forward", "backward", "optimizer", "loop")  # of a step; recomputation is part of backward
_GIB = 2**30

_WIDE = ["model.layers=4", "model.hidden=512", "model.heads=8", "model.ffn=2048", "model.sequence_length=256"]
_WIDE += ["model.vocab_size=2048", "moe.num_experts=8", "data.batch_size=8", "data.micro_batch_size=1"]
_NARROW = [*_WIDE, "model.hidden=384", "model.heads=6", "model.ffn=1536"]
_DENSE = ["moe.num_experts=0"]
_WIDER = [*_WIDE, "model.layers=2", "model.hidden=768", "model.heads=12", "model.ffn=3072"]
CPU: dict[int, dict[str, list[str]]] = {
    1: {
        "one process": [*_WIDE, "parallel=single", "data.batch_size=4", "data.micro_batch_size=4"],
        "… recomputing": [*_WIDE, "parallel=single", "data.batch_size=4", "model.recompute.granularity=block"],
        "… narrower, 4 micro-batches": [*_NARROW, "parallel=single", "data.batch_size=4"],
    },
    2: {
        "tensor 2": [*_WIDE, "parallel=tp2", "data.micro_batch_size=4"],
        "expert 2, recomputing": [
            *_WIDE,
            "parallel=ep2",
            "model.recompute.granularity=block",
            "data.micro_batch_size=4",
        ],
        "data 2, dense, wider": [*_WIDER, "parallel=dp2", *_DENSE, "data.micro_batch_size=4"],
        "sequence 2, narrower": [*_NARROW, "parallel=tp2", "parallel.sequence=true", "data.micro_batch_size=4"],
    },
    4: {
        "tensor 2 × expert 2": [*_WIDE, "parallel=tp2_ep2", "data.micro_batch_size=4"],
        "… DTD, CAC, recomputing": [*_WIDE, "parallel=tp2_ep2", "comm=ted", "model.recompute.granularity=block"],
        "tensor 4, wider": [*_WIDER, "parallel=tp4", "data.micro_batch_size=4"],
        "expert 4, top-2": [*_NARROW, "parallel=ep4", "moe.top_k=2", "data.micro_batch_size=2"],
    },
    8: {
        "tensor 2 × expert 4, DTD": [*_WIDE, "parallel=tp2_ep4", "comm=dtd", "data.micro_batch_size=2"],
        "tensor 4 × expert 2, wider": [*_WIDER, "parallel=tp4_ep2", "data.micro_batch_size=4"],
        "2 × 2 × 2, DTD, CAC, recomputing": [
            *_WIDE,
            "parallel=tp2_ep2_dp2",
            "comm=ted",
            "model.recompute.granularity=block",
        ],
    },
}

_GPU = ["trainer=gpu", "parallel=single", "model=gpt_1.3b", "model.vocab_size=50304", "moe=dense"]
_RANK = ["trainer=gpu", "parallel.world_size=128", "parallel.tensor=4", "parallel.expert=16", "moe=paper16"]
_RANK += ["comm=ted", "model.recompute.granularity=block", "trainer.precision=bf16-true", "model.vocab_size=50304"]
_RANK += ["data.batch_size=32", "data.micro_batch_size=1"]
CUDA = {
    "1.3B's width, 4 layers, bf16-true": [
        *_GPU,
        "model.layers=4",
        "trainer.precision=bf16-true",
        "data.batch_size=4",
        "data.micro_batch_size=4",
    ],
    "… bf16-mixed, 8 layers, 2 micro-batches": [
        *_GPU,
        "model.layers=8",
        "trainer.precision=bf16-mixed",
        "data.batch_size=4",
        "data.micro_batch_size=2",
    ],
    "… 4 layers, 8 experts, recomputing, bf16-true": [
        *_GPU,
        "model.layers=4",
        "moe=top1",
        "moe.num_experts=8",
        "model.recompute.granularity=block",
        "trainer.precision=bf16-true",
        "data.batch_size=8",
        "data.micro_batch_size=8",
    ],
    "6.7B's width, 2 layers, bf16-true": [
        *_GPU,
        "model=gpt_6.7b",
        "model.layers=2",
        "trainer.precision=bf16-true",
        "data.batch_size=4",
        "data.micro_batch_size=2",
    ],
}
CUDA_MEMORY = {
    "6.7B × 16 experts, one rank of 128": [*_RANK, "model=gpt_6.7b"],
    "2.7B × 16 experts, one rank of 128, DTD": [*_RANK, "model=gpt_2.7b", "comm=dtd"],
    "1.3B's width, 8 layers, one process": [
        *_GPU,
        "model.layers=8",
        "trainer.precision=bf16-true",
        "data.batch_size=2",
        "data.micro_batch_size=2",
    ],
}
CPU_MEMORY = {
    "one process, 8 experts": [*_WIDE, "parallel=single", "data.batch_size=4", "data.micro_batch_size=4"],
    "one rank of 128, DTD, CAC, recomputing": [
        *_WIDE,
        "parallel.world_size=128",
        "parallel.tensor=4",
        "parallel.expert=16",
        "moe.num_experts=16",
        "data.batch_size=128",
        "data.micro_batch_size=4",
        "comm=ted",
        "model.recompute.granularity=block",
    ],
}


@dataclass
class Measured:
    """One configuration in this process.

    Attributes:
        steps: seconds of each, by part.
        collectives: seconds that the collectives of each step took, by phase and operation.
        differences: between what was communicated and the closed form: calls and bytes.
        sent: bytes of a step.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    collectives: list[dict[str, float]] = field(default_factory=list)
    differences: int = 0
    sent: float = 0.0


@dataclass(frozen=True)
class Job:
    """What the processes measure."""

    configs: dict[str, TrainConfig]
    rounds: int
    steps: int  # of a round, the first of which is not timed
    output_dir: str


class Clock(Callback):
    """When the parts of optimizer steps begin.

    ``optimizer`` is all that is done with gradients, as in a simulation; ``loop`` is Lightning's, from one batch to the
    next. On a GPU by its clock, which knows when the device gets there; it is waited for only at the end of a step.
    """

    reads_grad = False

    def __init__(self, ledger: CommunicationLedger) -> None:
        self.ledger = ledger
        self.steps: list[list[tuple[str, Any]]] = [[]]
        self._totals: list[dict[str, float]] = []  # of collectives until each step's end

    def collectives(self) -> list[dict[str, float]]:
        """Seconds by phase and operation, of every step but the first."""
        return [{cause: b - a[cause] for cause, b in after.items()} for a, after in pairwise(self._totals)]

    def seconds(self) -> list[dict[str, float]]:
        """By part, of every step but the first."""
        steps = []
        for before, marks in zip(self.steps, self.steps[1:-1], strict=False):
            steps.append(dict.fromkeys(_PARTS, 0.0))
            for (part, begin), (_, end) in pairwise([before[-1], *marks]):
                taken = begin.elapsed_time(end) / 1e3 if isinstance(begin, torch.cuda.Event) else end - begin
                steps[-1][part] += taken
        return steps

    def _begins(self, part: str) -> None:
        mark: Any = time.perf_counter()
        if torch.cuda.is_initialized():
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self.steps[-1].append((part, mark))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begins("forward")

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self._begins("backward")

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begins("optimizer")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._begins("loop")
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.steps.append([])
            every = summed(self.ledger.ledger.totals, "phase", "op")
            totals = {key: count for key, count in every.items() if key[0] in TRAINING_PHASES}
            self._totals.append({"/".join(key): count.seconds for key, count in totals.items()})


class RandomBatches(Batches):
    """As simulated, but of different tokens."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        assert config.model.vocab_size is not None
        self.vocab_size = config.model.vocab_size

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randint(self.vocab_size, self.shape, generator=generator)


def measure(job: Job) -> dict[str, Any]:
    """Runs in every process: all configurations in turn, several times."""
    quieten()
    results: dict[str, Any] = {name: Measured() for name in job.configs}
    for _ in range(job.rounds):
        for name, config in job.configs.items():
            if isinstance(results[name], str):
                continue
            try:
                _round(config, job.steps, results[name])
            except Exception:
                if dist.is_initialized() and dist.get_world_size() > 1:
                    raise  # the others wait
                results[name] = traceback.format_exc()
    if dist.is_initialized():
        dist.destroy_process_group()
    return results


def _round(config: TrainConfig, steps: int, result: Measured) -> None:
    ledger = CommunicationLedger(config)
    clock = Clock(ledger)
    trainer = _trainer(config, [clock, ledger], steps)
    _clear("cuda" if config.trainer["accelerator"] == "gpu" else "cpu")
    trainer.fit(language_model(config), RandomBatches(config))
    result.steps += clock.seconds()
    totals: Totals = ledger.ledger.totals
    result.collectives += clock.collectives()
    result.sent = sum(count.wire_bytes for entry, count in totals.items() if entry.phase in TRAINING_PHASES) / steps
    result.differences += sum(
        abs(ours.calls - theirs.calls) + abs(ours.payload_bytes - theirs.payload_bytes)
        for ours, theirs in ledger.differences(trainer).values()
    )


def _trainer(config: TrainConfig, callbacks: list[Callback], steps: int, **options: Any) -> Trainer:
    settings = {
        **config.trainer,
        # To a rank of many that is alone nobody answers: what it gets may hold anything, NaN too.
        "strategy": strategy_of(config, stop_on_nonfinite=False),
        "max_steps": steps,
        "callbacks": callbacks,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    return Trainer(**(settings | options))


class Allocations(Callback):
    """The most that the allocator gave out in the second step.

    On a CPU, which keeps no record, by torch's profiler, on top of what training keeps.
    """

    def __init__(self, device: str) -> None:
        self.device, self.peak = device, 0
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx != trainer.accumulate_grad_batches:
            return
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return
        held = _held_bytes(trainer.strategy)  # type: ignore[arg-type]
        self.peak = held["parameters"] + held["optimizer"]
        self.profile.start()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
            return
        self.profile.stop()
        recorded: Any = self.profile.profiler
        events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        self.peak += most


def allocated(config: TrainConfig, device: str) -> int:
    """By the first rank in two steps with real tensors; what others would send has no values."""
    quieten()
    config = with_values(config, {"comm.backend": "fake"})
    _clear(device)
    allocations, world = Allocations(device), config.parallel.world_size
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    with fake_process_group(world, 0):
        trainer = _trainer(config, [allocations], 2, devices=1, num_nodes=world, plugins=[OneOfMany(world, 0)])
        trainer.fit(language_model(config), RandomBatches(config))
    return allocations.peak - before


def _clear(device: str) -> None:
    """Frees what earlier configurations left behind, cycles included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def composed(overrides: list[str]) -> TrainConfig:
    """A complete configuration of overrides."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", overrides=[*_MEASURED, *overrides])
    typed = OmegaConf.to_object(config)
    assert isinstance(typed, TrainConfig)
    return complete_simulated(typed)


class Report:
    """Rows, written to a file whenever there is another one."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.started = path, time.perf_counter()
        self.facts = surroundings(torch.device(device))
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        """One more row."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        wall = round(time.perf_counter() - self.started, 1)
        self.path.write_text(json.dumps(self.facts | {"wall_seconds": wall, "rows": self.rows}, indent=2) + "\n")
        print("failed" if "error" in row else "done", row["kind"], row["name"], flush=True)

    def attempt(self, function: Callable[[], dict[str, Any]], **row: Any) -> None:
        """A row with what ``function`` returns, or its traceback."""
        try:
            self.add(**row, **function())
        except Exception:
            self.add(**row, error=traceback.format_exc())

    def show(self) -> None:
        """Tables in Markdown."""
        console = Console(width=150)
        times = _table(
            "configuration",
            "processes",
            "predicted, s",
            "measured, s",
            "ratio",
            "quickest, s",
            "collectives, s",
            "bytes",
        )
        parts = _table("configuration: predicted / measured, s", *_PARTS)
        memory = _table("configuration", "allocated, GiB", "simulated, GiB", "ratio")
        for row in self.rows:
            if "error" in row:
                console.print(f"{row['name']}: {row['error'].strip().splitlines()[-1]}", markup=False)
            elif row["kind"] == "step time":
                shown = [row["name"], f"{row['processes']}"]
                shown += [f"{row[key]:.3f}" for key in ("predicted_s", "measured_s", "ratio")]
                shown += [f"{row['quickest_s']:.3f}"]
                shown += [f"{row['predicted_collectives_s']:.3f} / {row['measured_collectives_s']:.3f}"]
                times.add_row(*shown, "equal" if row["equal_bytes"] else "DIFFERENT")
                both = [(row["predicted_s_by_part"][part], row["measured_s_by_part"][part]) for part in _PARTS]
                parts.add_row(row["name"], *(f"{predicted:.4f} / {measured:.4f}" for predicted, measured in both))
            elif row["kind"] == "memory":
                sizes = [f"{row[key] / _GIB:.3f}" for key in ("measured_bytes", "predicted_bytes")]
                memory.add_row(row["name"], *sizes, f"{row['ratio']:.4f}")
        for table in (times, parts, memory):
            if table.row_count:
                console.print(table)
        console.print(f"saved in {self.path}")


def _table(*headings: str) -> Table:
    table = Table(box=MARKDOWN)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


def step_times(report: Report, overrides: dict[str, list[str]], processes: int, device: str, rounds: int) -> None:
    """Calibrates, measures, predicts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mine.yaml")
        settings = CalibrateConfig(str(path), processes, device)
        began = time.perf_counter()
        started(calibrate, settings, processes)
        cluster = load_cluster(path)
        report.add(
            kind="calibration",
            name=f"{processes} on {device}",
            seconds=time.perf_counter() - began,
            yaml=path.read_text().splitlines(),
        )
        configs = {name: composed(given) for name, given in overrides.items()}
        measured = started(measure, Job(configs, rounds, _STEPS[device] + 1, folder), processes)
        for name, config in configs.items():
            report.attempt(
                lambda name=name, config=config: _compared(config, measured[name], cluster),  # type: ignore[misc]
                kind="step time",
                name=name,
                processes=processes,
                overrides=overrides[name],
            )


def started(run: Callable[[Any], dict[str, Any]], job: Any, processes: int) -> dict[str, Any]:
    """In so many processes; one is this."""
    return run(job) if processes == 1 else launch(run, job, processes)


def _compared(config: TrainConfig, measured: Measured | str, cluster: ClusterConfig) -> dict[str, Any]:
    if isinstance(measured, str):
        return {"error": measured}
    simulation = simulate(config, cluster)
    steps = [sum(step.values()) for step in measured.steps]
    seconds = median(steps)
    predicted = dict.fromkeys(_PARTS, 0.0)
    for (phase, _), taken in simulation.seconds.items():
        predicted["backward" if phase == "recompute" else phase] += taken
    return {
        "predicted_s": simulation.step_seconds,
        "measured_s": seconds,
        "ratio": simulation.step_seconds / seconds,
        "quickest_s": min(steps),
        "measured_steps_s": steps,
        "predicted_s_by_part": predicted,
        "measured_s_by_part": {part: median(step[part] for step in measured.steps) for part in _PARTS},
        "predicted_collectives_s": sum(count.seconds for count in simulation.ledger.values()),
        "measured_collectives_s": median(sum(step.values()) for step in measured.collectives),
        "predicted_collectives_s_by_cause": {
            "/".join(key): count.seconds for key, count in summed(simulation.ledger, "phase", "op").items()
        },
        "measured_collectives_s_by_cause": {
            cause: median(step[cause] for step in measured.collectives) for cause in measured.collectives[0]
        },
        "predicted_s_by_cause": {f"{p}/{cause}": taken for (p, cause), taken in simulation.seconds.items()},
        "sent_bytes": measured.sent,
        "equal_bytes": measured.differences == 0
        and measured.sent == sum(count.wire_bytes for count in simulation.ledger.values()),
    }


def memory(report: Report, overrides: dict[str, list[str]], device: str) -> None:
    """Peak of the second step, allocated and simulated."""
    for name, given in overrides.items():

        def peaks(given: list[str] = given) -> dict[str, Any]:
            real = allocated(composed(given), device)
            simulated = sum(simulate(composed(given), load_cluster("dgx_h100")).memory.at_peak().values())
            return {"measured_bytes": real, "predicted_bytes": simulated, "ratio": simulated / real}

        report.attempt(peaks, kind="memory", name=name, overrides=given)


def main() -> None:
    """The command."""
    known = {"device": "cpu", "processes": "2,4,8", "rounds": "", "out": ""}
    for argument in sys.argv[1:]:
        name, equals, value = argument.partition("=")
        if name not in known or not equals:
            sys.exit(f"{argument}: there is no such argument. Valid: {', '.join(f'{n}=…' for n in known)}\n\n{__doc__}")
        known[name] = value
    device = known["device"]
    if device not in _STEPS:
        sys.exit(f"device={device} is unknown; valid: {', '.join(_STEPS)}")
    wanted = [int(number) for number in known["processes"].split(",") if number.isdecimal()]
    if not wanted or not CPU.keys() >= set(wanted):
        sys.exit(f"processes={known['processes']}: there are configurations for {', '.join(map(str, CPU))}")
    rounds = int(known["rounds"] or _ROUNDS[device])
    report = Report(Path(known["out"] or _RESULTS / f"truth_{device}.json"), device)
    try:
        if device == "cpu":
            for processes in wanted:
                step_times(report, CPU[processes], processes, device, rounds)
            memory(report, CPU_MEMORY, device)
        else:
            try:
                step_times(report, CUDA, 1, device, rounds)
            except Exception:  # peak memory needs none of it
                report.add(kind="step time", name="all", error=traceback.format_exc())
            memory(report, CUDA_MEMORY, device)
    except UsageError as error:
        sys.exit(f"{error}")
    report.show()


if __name__ == "__main__":
    # The processes to be import this module by its name.
    from benchmarks.truth import main as named

    named()
