"""What studies share that train: a sweep of runs, and means over their seeds."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from tedlab.history import read_history
from tedlab.launch.outcome import METRICS, SUMMARY

SEEDS = (0, 1, 2)


def train(*arguments: str) -> None:
    """Runs ``tedlab train`` with one thread: small models are no faster with more."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "tedlab.train", *arguments], check=True, env=environment)


def swept(directory: Path, overrides: Sequence[str]) -> list[Path]:
    """Trains with each seed, one run after the other, unless all have finished.

    Args:
        directory: Holds the runs' directories.
        overrides: Of the configuration.

    Returns:
        The directories of the runs, by seed.
    """
    runs = [directory / str(number) for number in range(len(SEEDS))]
    if not all((run / SUMMARY).is_file() for run in runs):
        train("-m", *overrides, f"seed={','.join(map(str, SEEDS))}", f"hydra.sweep.dir={directory}")
    return runs


def curve(run: Path) -> tuple[list[int], list[float]]:
    """Returns the steps at which a run logged its training loss, and the losses."""
    rows = [row for row in read_history(run / METRICS) if "train/loss" in row]
    return [int(row["step"]) for row in rows], [float(row["train/loss"]) for row in rows]


def spread(values: Sequence[float]) -> str:
    """Writes a mean with its range."""
    return f"{np.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def draw(path: Path, runs: Mapping[str, Sequence[Path]]) -> None:
    """Draws training losses: means over the runs of each name, with bands from the least to the largest."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, same in runs.items():
        curves = [curve(run) for run in same]
        steps, losses = curves[0][0], np.array([losses for _, losses in curves])
        (line,) = axes.plot(steps, losses.mean(0), label=name, linewidth=1)
        axes.fill_between(steps, losses.min(0), losses.max(0), alpha=0.2, color=line.get_color())
    axes.set(xlabel="step", ylabel=f"training loss, nats ({len(SEEDS)} seeds)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
