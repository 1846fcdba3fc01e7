"""What the studies of the paper's claims share: its model, simulations in parallel, files, and a look for pictures."""

import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tedlab.cli import CONF
from tedlab.config import TrainConfig
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.sim import Simulation, simulate
from tedlab.validate import complete_simulated

WORKERS = 2  # simulations at a time; each takes one core and some 0.5 GiB
MODES = {"baseline": "none", "+ DTD": "dtd", "+ CAC": "cac", "+ both": "ted"}  # name → preset of comm
# fp16, activation checkpointing that recomputes all of a block, 1024 sequences a step, no empty slots.
PAPER = (
    "trainer.precision=16-true",
    "model.recompute.granularity=block",
    "model.recompute.early_stop=false",
    "comm.skip_dead_gemm=false",
    "moe.capacity_factor=1",
    "data.batch_size=1024",
)
MODEL_40B = (
    *PAPER,
    "model=gpt_6.7b",
    "moe=paper16",
    "parallel.world_size=128",
    "parallel.tensor=4",
    "parallel.expert=16",
)


@dataclass(frozen=True)
class Job:
    """One simulation to run."""

    overrides: Sequence[str]
    cluster: ClusterConfig
    rank: int = 0


def composed(overrides: Sequence[str]) -> TrainConfig:
    """A configuration, not checked yet."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", overrides=["output_dir=unused", "choices={}", "logger=none", *overrides])
    typed = OmegaConf.to_object(config)
    assert isinstance(typed, TrainConfig)
    return typed


def configured(overrides: Sequence[str]) -> TrainConfig:
    """The complete configuration of a simulation."""
    return complete_simulated(composed(overrides))


def simulated(job: Job) -> Simulation:
    """Runs a job in this process.

    Raises:
        RuntimeError: if the ledger is not what the closed form says.
    """
    torch.set_num_threads(1)
    simulation = simulate(configured(job.overrides), job.cluster, job.rank)
    if simulation.differences:
        raise RuntimeError(f"ledger and closed form differ, with {' '.join(job.overrides)}: {simulation.differences}")
    return simulation


def simulate_all(jobs: Mapping[Any, Job]) -> dict[Any, Simulation]:
    """Runs jobs, several at a time, with a progress bar; results in the order of the jobs."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, context) as pool, progress("simulating", len(jobs)) as bar:
        futures = {pool.submit(simulated, job): name for name, job in jobs.items()}
        done = {}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            bar.advance(bar.task_ids[0])
    return {name: done[name] for name in jobs}


def progress(what: str, total: int) -> Progress:
    """A progress bar with one task."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    bar.add_task(what, total=total)
    return bar


def peak_gib(simulation: Simulation) -> float:
    """Most memory over the step."""
    return sum(simulation.memory.at_peak().values()) / 2**30


def write_json(path: Path, data: Any) -> None:
    """Rounded to six digits, so that files of equal content are equal."""
    path.write_text(json.dumps(_rounded(data), indent=1, ensure_ascii=False) + "\n")


def _rounded(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _rounded(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_rounded(value) for value in data]
    return float(f"{data:.6g}") if isinstance(data, float) else data


def canvas(title: str, columns: int = 1, size: tuple[float, float] = (9, 4.4)) -> tuple[Figure, Sequence[Axes]]:
    """A figure with a title and axes side by side."""
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes
