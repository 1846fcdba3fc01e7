"""Predicted against measured: step time, communication and peak memory after calibration.

    python -m benchmarks.truth                            CPU processes over gloo: 2, 4 and 8 of them
    python -m benchmarks.truth processes=1,2              other numbers of them
    python -m benchmarks.truth device=cuda                one GPU; peak memory also of a rank of 128
    python -m benchmarks.truth device=cuda processes=1,2  first two GPUs over NCCL, then one
    python -m benchmarks.truth again=FILE                 predicts once more what FILE has measured
    python -m benchmarks.truth only=OVERRIDE              only configurations with this override

``out=FILE.json`` and ``rounds=N`` (of a few steps of every configuration, in turn) have defaults. ``memory=false``
leaves out ranks that are alone, ``kernels=true`` also lists the longest kernels of a step, and ``tiny=true`` makes the
same configurations tiny, for a CPU, to see that all of it works. Calibration uses none of these configurations.
Everything is measured before anything is predicted, and the file is written after every configuration. What could not
be measured or predicted is in it with its traceback, and the others go on. Where experts have no capacity, the file has
what routers chose, and predictions are of the same choices.
"""

import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from benchmarks.skewed import EXPONENT
from benchmarks.steps import WARM_UP, composed, drawn_there
from benchmarks.surroundings import surroundings
from benchmarks.train_step import Profile
from benchmarks.truth_cases import CPU, CPU_MEMORY, CUDA, CUDA_MEMORY, TINY
from tedlab.callbacks import CommunicationLedger
from tedlab.callbacks.memory import _held_bytes
from tedlab.comm import TRAINING_PHASES
from tedlab.comm.ledger import Totals, summed
from tedlab.config import CalibrateConfig, TrainConfig, with_values
from tedlab.errors import UsageError
from tedlab.launch.launcher import launch
from tedlab.moe import routes_own_tokens
from tedlab.predict.calibrate import calibrate
from tedlab.predict.cluster import ClusterConfig, load_cluster
from tedlab.predict.sim import simulate
from tedlab.predict.sim.routing import SimulatedRouting, routing_of
from tedlab.predict.sim.simulation import Batches
from tedlab.predict.sim.world import OneOfMany, fake_process_group
from tedlab.run import language_model, quieten, strategy_of

_RESULTS = Path(__file__).parent / "results"
_WARM_UP = {"cpu": 1, "cuda": WARM_UP}  # steps of a round that are not timed: on a GPU some compile and allocate
_STEPS = {"cpu": 3, "cuda": 6}  # timed in a round
_ROUNDS = {"cpu": 2, "cuda": 1}  # a GPU has nothing else to do, and a run is short of its time
_KERNELS = 60  # listed of a step
_PARTS = ("forward", "backward", "optimizer", "loop")  # of a step; recomputation is part of backward
_PASSES = ("forward", "backward")  # in which the host waits for a GPU only where it reads what routers chose
_GIB = 2**30


@dataclass
class Measured:
    """One configuration in this process.

    Attributes:
        steps: seconds of each, by part.
        collectives: seconds that the collectives of each step took, by phase and operation; 0 unless they are timed.
        differences: between what was communicated and the closed form: calls and bytes.
        sent: bytes of a step.
        peak: the most bytes that a GPU's allocator gave out in a step after the first ones.
        choices: how often routers chose each expert in each step, (steps, MoE layers, experts), over all data ranks;
            None where no shape depends on it.
        host: seconds until the host had asked for each step's parts, which a GPU may do later.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    collectives: list[dict[str, float]] = field(default_factory=list)
    differences: int = 0
    sent: float = 0.0
    peak: int = 0
    choices: np.ndarray | None = None
    host: list[dict[str, float]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """For a row."""
        steps = [sum(step.values()) for step in self.steps]
        return {
            "measured_s": median(steps),
            "quickest_s": min(steps),
            "measured_steps_s": steps,
            "measured_s_by_part": {part: median(step[part] for step in self.steps) for part in _PARTS},
            "measured_host_s_by_part": {part: median(step[part] for step in self.host) for part in _PASSES},
            "measured_collectives_s": median(sum(step.values()) for step in self.collectives),
            "measured_collectives_s_by_cause": {
                cause: median(step[cause] for step in self.collectives) for cause in self.collectives[0]
            },
            "measured_bytes": self.peak,
            "sent_bytes": self.sent,
            "differences": self.differences,
        } | (
            {}
            if self.choices is None
            else {"choices": [[" ".join(map(str, layer)) for layer in step] for step in self.choices]}
        )


@dataclass(frozen=True)
class Job:
    """What the processes measure.

    Attributes:
        report: Where the first of them adds a row for each configuration.
        overrides: Of each configuration, by name.
        processes: How many there are.
        rounds: How often all configurations run.
        warm_up: Steps of a round that are not timed.
        steps: Steps of a round that are.
        kernels: Whether to list the kernels of a step instead.
        output_dir: Where files of the run would go.
    """

    report: "Report"
    overrides: Mapping[str, list[str]]
    processes: int
    rounds: int
    warm_up: int
    steps: int
    kernels: bool = False
    output_dir: str = "unused"

    @property
    def kind(self) -> str:
        """Of its rows."""
        return "kernels" if self.kernels else "step time"


class Clock(Callback):
    """When the parts of optimizer steps begin.

    ``optimizer`` is all that is done with gradients, as in a simulation; ``loop`` is Lightning's, from one batch to the
    next. On a GPU by its clock, which knows when the device gets there; it is waited for only at the end of a step.
    The host's clock is read at the same places.
    """

    reads_grad = False

    def __init__(self, ledger: CommunicationLedger) -> None:
        self.ledger = ledger
        self.steps: list[list[tuple[str, Any, float]]] = [[]]  # part, mark of the device, seconds of the host
        self._totals: list[dict[str, float]] = []  # of collectives until each step's end

    def collectives(self) -> list[dict[str, float]]:
        """Seconds by phase and operation, of every step but the first."""
        return [{cause: b - a[cause] for cause, b in after.items()} for a, after in pairwise(self._totals)]

    def seconds(self) -> list[dict[str, float]]:
        """By part, of every step but the first."""
        return self._by_part(lambda mark: mark[1])

    def host_seconds(self) -> list[dict[str, float]]:
        """By part, of every step but the first, on the host's clock."""
        return self._by_part(lambda mark: mark[2])

    def _by_part(self, moment: Callable[[tuple[str, Any, float]], Any]) -> list[dict[str, float]]:
        steps = []
        for before, marks in zip(self.steps, self.steps[1:-1], strict=False):
            steps.append(dict.fromkeys(_PARTS, 0.0))
            for mark, following in pairwise([before[-1], *marks]):
                begin, end = moment(mark), moment(following)
                taken = begin.elapsed_time(end) / 1e3 if isinstance(begin, torch.cuda.Event) else end - begin
                steps[-1][mark[0]] += taken
        return steps

    def _begins(self, part: str) -> None:
        now = time.perf_counter()
        mark: Any = now
        if torch.cuda.is_initialized():
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self.steps[-1].append((part, mark, now))

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
            ids = torch.randint(self.vocab_size, self.shape, generator=generator)
            yield ids.pin_memory() if torch.cuda.is_available() else ids  # from other memory the host would wait


def measure(job: Job) -> dict[str, Any]:
    """Runs in every process: all configurations in turn, several times."""
    quieten()
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    first, results = rank == 0, {name: Measured() for name in job.overrides}
    try:
        for number in range(job.rounds):
            for name, overrides in job.overrides.items():
                row = {"kind": job.kind, "name": name, "processes": job.processes, "overrides": overrides}
                if first:
                    job.report.starts(row)
                if job.kernels:
                    profile = Profile(_KERNELS)
                    _round(composed(overrides), WARM_UP, 1, Measured(), profile)
                    figures: dict[str, Any] = {"kernels": profile.table.splitlines()}
                else:
                    _round(composed(overrides), job.warm_up, job.steps, results[name])
                    figures = results[name].figures()
                if first and number + 1 == job.rounds:
                    job.report.add(**row, **figures)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return {}


def _round(config: TrainConfig, warm_up: int, steps: int, result: Measured, *callbacks: Callback) -> None:
    ledger, gpu = CommunicationLedger(config), config.trainer["accelerator"] == "gpu"
    clock, peak, choices = Clock(ledger), Peak(warm_up), Choices(warm_up)
    recording = [*([choices] if config.moe.ragged else []), *([peak] if gpu else [])]
    trainer = _trainer(config, [clock, ledger, *recording, *callbacks], warm_up + steps)
    _clear("cuda" if gpu else "cpu")
    before = torch.cuda.memory_allocated() if gpu else 0
    with patch("tedlab.models.gpt.initialize", drawn_there) if gpu else nullcontext():
        trainer.fit(language_model(config), RandomBatches(config))
    result.steps += clock.seconds()[warm_up - 1 :]
    result.host += clock.host_seconds()[warm_up - 1 :]
    totals: Totals = ledger.ledger.totals
    result.collectives += clock.collectives()[warm_up - 1 :]
    sent = sum(count.wire_bytes for entry, count in totals.items() if entry.phase in TRAINING_PHASES)
    result.sent = sent / (warm_up + steps)
    result.peak = max(result.peak, peak.bytes - before)
    if config.moe.ragged:
        result.choices = np.concatenate([*([] if result.choices is None else [result.choices]), choices.made])
    result.differences += sum(
        abs(ours.calls - theirs.calls) + abs(ours.payload_bytes - theirs.payload_bytes)
        for ours, theirs in ledger.differences(trainer).values()
    )


class Peak(Callback):
    """The most that the GPU's allocator gave out after the first steps."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.bytes = warm_up, 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.warm_up * trainer.accumulate_grad_batches:
            torch.cuda.reset_peak_memory_stats()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bytes = torch.cuda.max_memory_allocated()


class Choices(Callback):
    """What routers chose after the first steps; it is read from the devices only at the end."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.made = warm_up, np.zeros((0, 0, 0), dtype=np.int64)
        self._micro_batches: list[torch.Tensor] = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx >= self.warm_up * trainer.accumulate_grad_batches:
            self._micro_batches.append(outputs["routers"].load)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        degrees, own = trainer.strategy.topology.degrees, routes_own_tokens(pl_module)  # type: ignore[attr-defined]
        # The others of the tensor ranks count the same tokens, unless they divide the positions.
        loads = torch.stack(self._micro_batches).double()
        mean = trainer.strategy.reduce(loads.unflatten(0, (-1, trainer.accumulate_grad_batches)).sum(1))
        self.made = (mean * (degrees.world_size if own else degrees.data)).round().long().cpu().numpy()


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


class Report:
    """A file of rows, written whenever there is another one, by this process or by one that it waits for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, device: str) -> None:
        """Writes on what machine; what the file had is lost."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write(surroundings(torch.device(device)) | {"began": time.time(), "measuring": None, "rows": []})

    def rows(self, *kinds: str) -> list[dict[str, Any]]:
        """Those of these kinds."""
        return [row for row in self._read()["rows"] if row["kind"] in kinds]

    def starts(self, row: dict[str, Any]) -> None:
        """Notes what is being measured, in case it cannot be."""
        self._write(self._read() | {"measuring": row})

    def measuring(self) -> dict[str, Any] | None:
        """Returns what was started and has no row yet."""
        started: dict[str, Any] | None = self._read()["measuring"]
        return started

    def add(self, **row: Any) -> None:
        """Adds a row, or more to the row of the same kind, name and number of processes."""
        report = self._read()
        same = [old for old in report["rows"] if _key(old) == _key(row)]
        if same:
            same[0] |= row
        else:
            report["rows"].append(row)
        wall = round(time.time() - report["began"], 1) if "began" in report else report["wall_seconds"]
        self._write(report | {"measuring": None, "wall_seconds": wall})
        failed = "error" in row or "prediction_error" in row
        print("failed" if failed else "done", row["kind"], row["name"], f"after {wall} s", flush=True)

    def ends(self) -> None:
        """What is added from now on is no part of the run's time."""
        self._write({key: value for key, value in self._read().items() if key != "began"})

    def _read(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.path.read_text())
        return report

    def _write(self, report: dict[str, Any]) -> None:
        part = self.path.with_suffix(".part")  # a run may be cut off at any time
        part.write_text(json.dumps(report, indent=2) + "\n")
        part.replace(self.path)

    def attempt(self, function: Callable[[], dict[str, Any]], **row: Any) -> None:
        """A row with what ``function`` returns, or its traceback; what the user did wrong ends the program."""
        try:
            self.add(**row, **function())
        except UsageError:
            raise
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
        for row in self.rows("step time", "memory", "kernels", "calibration"):
            if error := row.get("error") or row.get("prediction_error"):
                console.print(f"{row['name']}: {error.strip().splitlines()[-1]}", markup=False)
            elif row["kind"] == "step time":
                shown = [row["name"], f"{row['processes']}"]
                shown += [f"{row[key]:.3f}" for key in ("predicted_s", "measured_s", "ratio")]
                shown += [f"{row['quickest_s']:.3f}"]
                shown += [f"{row['predicted_collectives_s']:.3f} / {row['measured_collectives_s']:.3f}"]
                times.add_row(*shown, "equal" if row["equal_bytes"] else "DIFFERENT")
                if row["measured_bytes"]:
                    memory.add_row(row["name"], *_sizes(row))
                both = [(row["predicted_s_by_part"][part], row["measured_s_by_part"][part]) for part in _PARTS]
                parts.add_row(row["name"], *(f"{predicted:.4f} / {measured:.4f}" for predicted, measured in both))
            elif row["kind"] == "memory":
                memory.add_row(row["name"], *_sizes(row))
        for table in (times, parts, memory):
            if table.row_count:
                console.print(table)
        console.print(f"saved in {self.path}")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["kind"], row["name"], row.get("processes")


def _sizes(row: dict[str, Any]) -> list[str]:
    measured, predicted = row["measured_bytes"], row["predicted_bytes"]
    return [f"{measured / _GIB:.3f}", f"{predicted / _GIB:.3f}", f"{predicted / measured:.4f}"]


def _table(*headings: str) -> Table:
    table = Table(box=MARKDOWN)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


def calibrated(report: Report, processes: int, device: str, quick: bool) -> None:
    """Adds what calibration with so many processes writes."""

    def calibration() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path, began = Path(folder, "mine.yaml"), time.perf_counter()
            launch(calibrate, CalibrateConfig(str(path), processes, device, quick), processes)
            return {"seconds": time.perf_counter() - began, "yaml": path.read_text().splitlines()}

    report.attempt(calibration, kind="calibration", name=f"{processes} on {device}", processes=processes)


def measured(job: Job) -> None:
    """Measures all configurations of a job; one that fails ends its processes, and others begin with the next."""
    while missing := _missing(job):
        try:
            launch(measure, replace(job, overrides=missing), job.processes)
        except Exception:
            row = job.report.measuring() or {"kind": job.kind, "name": "all", "processes": job.processes}
            job.report.add(**row, error=traceback.format_exc())
            if "overrides" not in row:  # no configuration was to blame
                return


def _missing(job: Job) -> dict[str, list[str]]:
    done = {_key(row) for row in job.report.rows(job.kind)}
    return {name: given for name, given in job.overrides.items() if (job.kind, name, job.processes) not in done}


def predicted(report: Report) -> None:
    """Adds to every step that was measured what it would have been by the calibration with as many processes."""
    clusters = {row["processes"]: row for row in report.rows("calibration") if "error" not in row}
    for row in report.rows("step time"):
        if "error" in row:
            continue
        same = {key: row[key] for key in ("kind", "name", "processes")}
        try:
            report.add(**same, **prediction(row, calibrated_cluster(clusters[row["processes"]]["yaml"])))
        except Exception:
            report.add(**same, prediction_error=traceback.format_exc())


def calibrated_cluster(lines: list[str]) -> ClusterConfig:
    """Reads the lines of a cluster file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mine.yaml")
        path.write_text("\n".join(lines))
        return load_cluster(path)


def prediction(row: dict[str, Any], cluster: ClusterConfig) -> dict[str, Any]:
    """Returns a step's prediction on a cluster, beside what a row says was measured.

    Times are those of the process with the most to do in all steps, which others wait for; bytes and memory are the
    first one's, as measured, in the step in which it has the most.
    """
    config = composed(row["overrides"])
    average, steps = _routings(row, config)
    simulation = simulate(config, cluster, 0 if average is None else average.busiest_rank(), routing=average)
    first = simulation
    if steps:
        fullest = max(steps, key=lambda routing: sum(rows.computed for rows in routing.rows(0).values()))
        first = simulate(config, cluster, routing=fullest)
    parts = dict.fromkeys(_PARTS, 0.0)
    for (phase, _), taken in simulation.seconds.items():
        parts["backward" if phase == "recompute" else phase] += taken
    sent = sum(count.wire_bytes for count in first.ledger.values())
    return {
        "predicted_s": simulation.step_seconds,
        "ratio": simulation.step_seconds / row["measured_s"],
        "predicted_s_by_part": parts,
        "predicted_collectives_s": sum(count.seconds for count in simulation.ledger.values()),
        "predicted_collectives_s_by_cause": {
            "/".join(key): count.seconds for key, count in summed(simulation.ledger, "phase", "op").items()
        },
        "predicted_s_by_cause": {f"{p}/{cause}": taken for (p, cause), taken in simulation.seconds.items()},
        "predicted_bytes": sum(first.memory.at_peak().values()),
        "predicted_sent_bytes": sent,
        # Where routers decide, the closed form knows the bytes of the choices that were made, a simulation of others.
        "equal_bytes": row["differences"] == 0 and (config.moe.ragged or row["sent_bytes"] == sent),
    }


def _routings(row: dict[str, Any], config: TrainConfig) -> tuple[SimulatedRouting | None, list[SimulatedRouting]]:
    """Returns the choices that a row has, of all steps and of each, or their law; None: all experts equally often."""
    if "choices" not in row:
        return routing_of(config, "zipf", EXPONENT, None) if config.moe.gating == "zipf" else None, []
    steps: Any = row["choices"]
    if isinstance(steps[0], str):  # a file that has the sums over all steps
        steps = [steps]
    chosen = np.array([[layer.split() for layer in step] for step in steps], dtype=float)
    return SimulatedRouting(config, chosen.sum(0)), [SimulatedRouting(config, step) for step in chosen]


def memory(report: Report, overrides: dict[str, list[str]], device: str) -> None:
    """Peak of the second step, allocated and simulated."""
    for name, given in overrides.items():

        def peaks(given: list[str] = given) -> dict[str, Any]:
            real = allocated(composed(given), device)
            simulated = sum(simulate(composed(given), load_cluster("dgx_h100")).memory.at_peak().values())
            return {"measured_bytes": real, "predicted_bytes": simulated, "ratio": simulated / real}

        report.attempt(peaks, kind="memory", name=name, overrides=given)


def arguments(given: Sequence[str]) -> dict[str, str]:
    """Reads the command line; anything that it cannot mean ends the program with a sentence."""
    known = dict.fromkeys(("device", "processes", "only", "rounds", "out", "memory", "kernels", "tiny", "again"), "")
    for argument in given:
        name, equals, value = argument.partition("=")
        if name not in known or not equals:
            sys.exit(f"{argument}: there is no such argument. Valid: {', '.join(f'{n}=…' for n in known)}\n\n{__doc__}")
        known[name] = value
    for name in ("memory", "kernels", "tiny"):
        if known[name] not in ("", "true", "false"):
            sys.exit(f"{name}={known[name]} is neither true nor false")
    if known["rounds"] and not (known["rounds"].isdecimal() and int(known["rounds"])):
        sys.exit(f"rounds={known['rounds']} is not a whole number of at least 1")
    if known["device"] not in ("", *_STEPS):
        sys.exit(f"device={known['device']} is unknown; valid: {', '.join(_STEPS)}")
    if known["again"] and not Path(known["again"]).is_file():
        sys.exit(f"again={known['again']}: there is no such file")
    return known


def main() -> None:
    """The command."""
    known = arguments(sys.argv[1:])
    if known["again"]:
        report = Report(Path(known["again"]))
        report.ends()
        predicted(report)
        return report.show()
    cases, tiny = known["device"] or "cpu", known["tiny"] == "true"
    configs = {"cpu": CPU, "cuda": CUDA}[cases]
    numbers = known["processes"] or {"cpu": "2,4,8", "cuda": "1"}[cases]
    if not {str(number) for number in configs} >= {*numbers.split(",")}:
        sys.exit(f"processes={numbers}: there are configurations for {', '.join(map(str, configs))}")
    wanted, only = [int(number) for number in numbers.split(",")], [known["only"]] if known["only"] else []
    if any(not any({*only} <= {*given} for given in configs[number].values()) for number in wanted):
        sys.exit(f"only={known['only']}: no configuration for processes={numbers} has this override")
    device = "cpu" if tiny else cases
    report = Report(Path(known["out"] or _RESULTS / f"truth_{cases}.json"))
    report.begin(device)
    rounds, jobs = int(known["rounds"] or _ROUNDS[cases]), []
    try:
        for processes in sorted(wanted, reverse=True):  # what most machines cannot measure comes first
            calibrated(report, processes, device, tiny)
            chosen = {name: given for name, given in configs[processes].items() if {*only} <= {*given}}
            overrides = {name: [*given, *(TINY if tiny else [])] for name, given in chosen.items()}
            jobs.append(Job(report, overrides, processes, rounds, _WARM_UP[cases], _STEPS[cases]))
            measured(jobs[-1])
        if known["kernels"] == "true":
            for job in jobs:
                measured(replace(job, rounds=1, kernels=True))
        predicted(report)
        if known["memory"] != "false" and not tiny:
            memory(report, {"cpu": CPU_MEMORY, "cuda": CUDA_MEMORY}[cases], device)
    except UsageError as error:
        sys.exit(f"{error}")
    return report.show()


if __name__ == "__main__":
    # The processes to be import this module by its name.
    from benchmarks.truth import main as named

    named()
