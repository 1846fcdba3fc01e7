"""Draws two pictures of a simulated step: memory over time, and where the time goes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from tedlab.comm import TRAINING_PHASES
from tedlab.compare.charts import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.sim.memory import Category
from tedlab.predict.sim.meter import KERNELS, MATRICES
from tedlab.predict.sim.simulation import HIDDEN, Simulation

_GIB = 2**30
_GREY = "#9aa0a6"
_MEMORY: Mapping[Category, str] = {
    "parameters": BLUE,
    "optimizer": PURPLE,
    "gradients": GREEN,
    "stash": VERMILION,
    "activations": ORANGE,
    "temporaries": SKY,
}
_CAUSES = {
    MATRICES: BLUE,
    KERNELS: SKY,
    "all_reduce": ORANGE,
    "all_to_all": VERMILION,
    "all_gather": GREEN,
    "reduce_scatter": PURPLE,
}
_POINTS = 4000  # across the picture


def memory_picture(simulation: Simulation, cluster: ClusterConfig, path: Path) -> None:
    """Draws memory by category over predicted time, and the memory of a GPU."""
    timeline = simulation.memory
    shown = _highest(timeline.seconds, timeline.total)
    figure = Figure(figsize=(9, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.stackplot(
        timeline.seconds[shown],
        *(timeline.held[category][shown] / _GIB for category in _MEMORY),
        labels=list(_MEMORY),
        colors=list(_MEMORY.values()),
        step="post",
        linewidth=0,
    )
    top = axes.get_ylim()[1]
    axes.axhline(cluster.memory_bytes / _GIB, color="black", ls="--", lw=1, label="memory of a GPU")
    axes.set_ylim(0, max(top, cluster.memory_bytes / _GIB * 1.06) if cluster.memory_bytes / _GIB < 2 * top else top)
    for start, times in simulation.micro_batches:
        axes.axvline(start, color="black", lw=0.5)
        text = "micro-batch" if times == 1 else f"… {times} like this"
        axes.annotate(text, (start, 1), xycoords=("data", "axes fraction"), xytext=(3, 3), textcoords="offset points")
    axes.set_xlim(0, timeline.seconds[-1])
    axes.set_xlabel("predicted seconds")
    axes.set_ylabel("GiB")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, reverse=True)
    figure.savefig(path)


def time_picture(simulation: Simulation, path: Path) -> None:
    """Draws predicted time by phase and cause; collectives that use the network between nodes are hatched."""
    figure = Figure(figsize=(9, 3.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    phases = list(reversed(TRAINING_PHASES))
    left = np.zeros(len(phases))
    for cause in sorted(causes(simulation), key=lambda cause: (list(_CAUSES).index(cause.split(",")[0]), cause)):
        name, _, link = cause.partition(", ")
        values = np.array([simulation.seconds.get((phase, cause), 0.0) for phase in phases])
        label = f"{name} {link.replace('_', ' ')}".strip()
        hatch = "////" if link == "between_nodes" else None
        axes.barh(phases, values, left=left, color=_CAUSES[name], hatch=hatch, edgecolor="white", lw=0, label=label)
        left += values
    axes.set_xlabel("predicted seconds of a step")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path)


def causes(simulation: Simulation) -> list[str]:
    """Returns the causes that take time: first computation, then collectives."""
    found = {cause for (_, cause), taken in simulation.seconds.items() if taken and cause != HIDDEN}
    first = [cause for cause in (MATRICES, KERNELS) if cause in found]
    return first + sorted(found.difference(first))


def _highest(seconds: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Returns the indices of the highest value in each of ``_POINTS`` equal spans of time, and of the last value."""
    span = (seconds / max(seconds[-1], 1e-12) * _POINTS).astype(int)
    order = np.lexsort((-total, span))
    first = np.ones(len(order), dtype=bool)
    first[1:] = span[order][1:] != span[order][:-1]
    return np.append(order[first], len(seconds) - 1)
