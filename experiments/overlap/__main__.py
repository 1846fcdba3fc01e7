"""``python -m experiments.overlap``: what toggles hide of emulated exchanges, measured on gloo; see README.md."""

import functools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table
from typing_extensions import override

from experiments.paper import canvas, configured, write_json
from tedlab.callbacks import CommunicationLedger
from tedlab.config import CalibrateConfig, TrainConfig
from tedlab.console import output
from tedlab.launch.launcher import launch
from tedlab.predict.calibrate import calibrate
from tedlab.predict.cluster import ClusterConfig, Link, load_cluster
from tedlab.predict.emulate import Emulation
from tedlab.predict.sim import Simulation, simulate
from tedlab.predict.sim.meter import KERNELS as OTHERS
from tedlab.predict.sim.meter import MATRICES
from tedlab.progress import CommandProgress
from tedlab.run import language_model, quieten, strategy_of

HERE = Path(__file__).parent
PROCESSES, ROUNDS, WARM_UP, STEPS = 2, 5, 1, 4
SHARES = (0.3, 0.9)  # what the exchanges of a step take, of what its kernels do
MODEL = (
    *("model.layers=2", "model.hidden=256", "model.heads=4", "model.ffn=1024", "model.sequence_length=128"),
    *("model.vocab_size=512", "moe.num_experts=4", "moe.every=1", "parallel=ep2", "trainer=cpu"),
    *("trainer.precision=32-true", "data.micro_batch_size=8", "data.batch_size=16", "optim.tile=null"),
)
SHARED = (*MODEL, "moe.shared.experts=1", "moe.shared.ffn=1024")
SEVERAL = (*MODEL, "data.batch_size=64")  # 4 micro-batches
CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "comm.overlap_shared=true": (SHARED, "expert"),
    "comm.chunks=2": (MODEL, "expert"),
    "comm.chunks=4": (MODEL, "expert"),
    "comm.interleave=true": (SEVERAL, "expert"),
    "optim.overlap=true": ((*MODEL, "optim.bucket_elements=200000"), "data"),
}


@dataclass(frozen=True)
class Job:
    """What the processes measure.

    Attributes:
        links: Toggles with what is predicted of each on a link, and the cluster with that link.
        results: File for what the first process measures.
        output_dir: A folder.
    """

    links: tuple[tuple["Row", ClusterConfig], ...]
    results: str
    output_dir: str = ""


@dataclass
class Row:
    """One toggle on one link.

    Attributes:
        toggle: The toggle.
        share: What the collectives that it may hide take, of what kernels do.
        alone_s: Seconds of these in a step.
        step_s: Median seconds of a step without the toggle.
        predicted: The share of ``alone_s`` that the timeline says is hidden.
        gained: The share by which steps with the toggle are shorter: the median over rounds.
        gains: This of each round.
    """

    toggle: str
    share: float
    alone_s: float
    step_s: float
    predicted: float
    gained: float = 0.0
    gains: list[float] = field(default_factory=list)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and the third quartile of the gains."""
        first, _, third = quantiles(self.gains, n=4, method="inclusive")
        return first, third


def main() -> None:
    """The command."""
    with tempfile.TemporaryDirectory() as folder:
        mine, results = Path(folder, "mine.yaml"), Path(folder, "results.pt")
        launch(calibrate, CalibrateConfig(str(mine), PROCESSES, "cpu"), PROCESSES)
        quieten()
        links = tuple(_links(load_cluster(mine)))
        launch(measure, Job(links, str(results), folder), PROCESSES)
        rows: list[Row] = torch.load(results, weights_only=False)  # written by our own process
    write_json(HERE / "results.json", {"rows": [vars(row) for row in rows]})
    show(rows)
    picture(rows)


def measure(job: Job) -> dict[str, Any]:
    """Runs in each process: every case in turn, without the toggle and with it."""
    quieten()
    torch.set_num_threads(1)
    with CommandProgress(disable=not _first()) as bar:
        task = bar.add_task("steps", total=2 * ROUNDS * len(job.links))
        for row, cluster in job.links:
            configs = [configured((*CASES[row.toggle][0], *given)) for given in ((), (row.toggle,))]
            seconds: tuple[list[float], list[float]] = ([], [])
            for _ in range(ROUNDS):
                for config, taken in zip(configs, seconds, strict=True):
                    taken.append(_step_seconds(config, cluster))
                    bar.update(task, advance=1, description=row.toggle)
            row.step_s = median(seconds[0])
            row.gains = [(off - on) / row.alone_s for off, on in zip(*seconds, strict=True)]
            row.gained = median(row.gains)
    dist.destroy_process_group()
    if _first():
        torch.save([row for row, _ in job.links], job.results)
    return {}


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _links(cluster: ClusterConfig) -> Iterator[tuple[Row, ClusterConfig]]:
    """Yields each toggle on links on which what it may hide takes these shares of what kernels take."""
    for toggle, (overrides, kind) in CASES.items():
        at_once = simulate(configured(overrides), _with_bandwidth(cluster, 1.0))  # a byte a second
        kernels = sum(taken for (_, cause), taken in at_once.seconds.items() if cause in (MATRICES, OTHERS))
        for share in SHARES:
            on_link = _with_bandwidth(cluster, _alone(at_once, kind) / (share * kernels))
            on = simulate(configured((*overrides, toggle)), on_link)
            alone = _alone(on, kind)
            yield Row(toggle, share, alone, 0.0, sum(on.hidden.values()) / alone), on_link


def _with_bandwidth(cluster: ClusterConfig, bandwidth: float) -> ClusterConfig:
    return replace(cluster, gpus_per_node=PROCESSES, in_node=Link(bandwidth, 1e-9), collectives=[], waits=[])


def _alone(simulation: Simulation, kind: str) -> float:
    return sum(count.seconds for entry, count in simulation.ledger.items() if _hideable(entry, kind))


def _hideable(entry: Any, kind: str) -> bool:
    return entry.tag == "gradients.reduce" if kind == "data" else entry.op == "all_to_all"


def _step_seconds(config: TrainConfig, cluster: ClusterConfig) -> float:
    """Returns the median seconds of some steps on the emulated link, of the slowest process."""
    clock = _Clock()
    settings = {
        **config.trainer,
        "max_steps": WARM_UP + STEPS,
        "strategy": strategy_of(config),
        "callbacks": [clock, CommunicationLedger(config, functools.partial(Emulation, cluster))],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    trainer = Trainer(**settings)
    trainer.fit(language_model(config), _Tokens(config))
    taken = torch.tensor(clock.seconds[WARM_UP:]).median()
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


class _Clock(Callback):
    """Seconds of each step, from when all processes are ready."""

    reads_grad = False

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            dist.barrier()
            self._began = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.seconds.append(time.perf_counter() - self._began)


class _Tokens:
    def __init__(self, config: TrainConfig) -> None:
        assert config.model.vocab_size is not None
        self.shape, self.vocab_size = (
            (config.data.micro_batch_size, config.model.sequence_length + 1),
            config.model.vocab_size,
        )

    def __iter__(self) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randint(self.vocab_size, self.shape, generator=generator)


def show(rows: list[Row]) -> None:
    """Prints a table."""
    table = Table(
        "toggle", "collectives, of kernels", "step without, ms", "predicted", "step shorter", "middle half of rounds"
    )
    for row in rows:
        spread = "{:.0%} to {:.0%}".format(*row.spread)
        shares = f"{row.share:.0%}", f"{1e3 * row.step_s:.0f}", f"{row.predicted:.0%}", f"{row.gained:.0%}"
        table.add_row(row.toggle, *shares, spread)
    output().print(table)


def picture(rows: list[Row]) -> None:
    """Draws what was gained beside what was predicted."""
    figure, (axes,) = canvas("Hidden on emulated links, of what the collectives take", size=(9, 4.4))
    places = range(len(rows))
    axes.barh([place - 0.2 for place in places], [100 * row.predicted for row in rows], 0.4, label="predicted")
    lengths = [100 * row.gained for row in rows]
    spreads = [row.spread for row in rows]
    errors = [
        [100 * (row.gained - first) for row, (first, _) in zip(rows, spreads, strict=True)],
        [100 * (third - row.gained) for row, (_, third) in zip(rows, spreads, strict=True)],
    ]
    axes.barh([place + 0.2 for place in places], lengths, 0.4, xerr=errors, label="a step became shorter by")
    axes.set_yticks(list(places), [f"{row.toggle}, {row.share:.0%}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("%")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(HERE / "hidden.png")


if __name__ == "__main__":
    from experiments.overlap.__main__ import main as named  # processes import this module by its name

    named()
