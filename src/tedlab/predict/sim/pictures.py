"""Draws pictures of a simulated step: memory over time, where the time goes, and what runs beside what."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from tedlab.comm import TRAINING_PHASES
from tedlab.compare.charts import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.sim.lanes import LANES, Span
from tedlab.predict.sim.memory import Category
from tedlab.predict.sim.meter import HIDDEN, KERNELS, MATRICES
from tedlab.predict.sim.simulation import Simulation

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


def lanes_picture(simulation: Simulation, path: Path) -> None:
    """Draws what runs beside what: of the last micro-batch, the exchanges of one layer in both passes, or all of it."""
    start = simulation.micro_batches[-1][0]
    spans = [span for span in simulation.spans if span.end > start]
    shown = [
        window
        for phase in ("forward", "backward")
        if (window := _around_an_exchange([span for span in spans if span.phase == phase])) is not None
    ]
    draw_lanes(spans, shown or [(start, max(span.end for span in spans))], path)


def draw_lanes(spans: Sequence[Span], windows: Sequence[tuple[float, float]], path: Path) -> None:
    """Draws windows of a timeline, from its first to its last second, below each other."""
    figure = Figure(figsize=(9, 0.6 + 1.5 * len(windows)), dpi=150, layout="constrained")
    labelled: dict[str, Artist] = {}
    lanes = [lane for lane in LANES if lane == "compute" or any(span.lane == lane for span in spans)]
    for axes, (first, last) in zip(figure.subplots(len(windows), squeeze=False).flat, windows, strict=True):
        scale, unit = (1e3, "ms") if last - first < 10 else (1.0, "s")
        for span in spans:
            start, end = max(span.start, first), min(span.end, last)
            if start >= end:
                continue
            name = span.name if span.lane == "compute" else span.name.split()[0]
            where = ((start - first) * scale, (end - start) * scale)
            bar = axes.broken_barh(
                [where], (lanes.index(span.lane) - 0.4, 0.8), color=_CAUSES[name], ec="white", lw=0.3
            )
            labelled.setdefault(name.replace("_", " "), bar)
        axes.set_yticks(range(len(lanes)), [lane.replace("_", " ") for lane in lanes])
        axes.invert_yaxis()
        axes.set_xlim(0, (last - first) * scale)
        axes.set_xlabel(f"predicted {unit} from {first * scale:.3f} {unit}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(list(labelled.values()), list(labelled), loc="outside right center", frameon=False)
    figure.savefig(path)


def _around_an_exchange(spans: Sequence[Span]) -> tuple[float, float] | None:
    """Returns the time around the exchanges of the middle one of the layers that exchange tokens in a phase."""
    exchanges = [span for span in spans if span.name.startswith("all_to_all")]
    names = [None, *(span.name for span in exchanges)]
    starts = [n for n, (before, name) in enumerate(itertools.pairwise(names)) if name == names[1] != before]
    if not starts:
        return None
    middle = len(starts) // 2
    layer = exchanges[starts[middle] : (*starts, None)[middle + 1]]
    start, end = layer[0].start, max(span.end for span in layer)
    around = 0.25 * (end - start)
    return max(0.0, start - around), end + around


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
