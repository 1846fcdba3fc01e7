"""Step-time breakdowns and their pictures, of the paper's toggles on one cluster."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.paper import MODEL_40B, MODES, Job, canvas, configured, peak_gib, simulate_all, write_json
from experiments.uncertainty import BASELINE, BOTH, READINGS, Draws, Unknown, einsum_flops, monte_carlo
from tedlab.comm import Phase
from tedlab.compare.charts import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.sim import Simulation
from tedlab.predict.sim.meter import KERNELS, MATRICES

RANK = 4  # of a tensor group that has two nodes where a node has 6 GPUs: the slowest, for which a job waits
DRAWS = 4000
GREY = "#9aa0a6"
SYNC = "gradient sync"  # gradients reduced, parameters gathered
NAMES = {"all_reduce": "all-reduce", "all_to_all": "all-to-all", "all_gather": "all-gather"}  # for people
PARTS = {  # of a step
    MATRICES: BLUE,
    KERNELS: SKY,
    "all_reduce": ORANGE,
    "all_to_all": VERMILION,
    "all_gather": GREEN,
    SYNC: PURPLE,
    "optimizer": GREY,
}


def parts(seconds: Mapping[tuple[Phase, str], float]) -> dict[str, float]:
    """Predicted time by the names of ``PARTS``, from that by phase and cause."""
    result: defaultdict[str, float] = defaultdict(float)
    for (phase, cause), taken in seconds.items():
        communicates = "," in cause
        if phase == "optimizer":
            result[SYNC if communicates else "optimizer"] += taken
        else:
            result[cause.split(",")[0]] += taken
    return {name: result[name] for name in PARTS}


def jobs(micro_batches: Sequence[int], cluster: ClusterConfig) -> dict[tuple[str, int], Job]:
    """Each toggle with each micro-batch size: the simulations that :func:`study` needs."""
    return {
        (mode, size): Job((*MODEL_40B, f"comm={preset}", f"data.micro_batch_size={size}"), cluster, RANK)
        for mode, preset in MODES.items()
        for size in micro_batches
    }


def study(
    directory: Path, title: str, cluster: ClusterConfig, unknowns: Mapping[str, Unknown]
) -> tuple[dict[str, Any], Mapping[tuple[str, int], Simulation]]:
    """Simulates, prices, draws; writes ``results.json``, ``draws.csv``, ``breakdown.png`` and ``speedup.png``.

    Args:
        directory: for the files.
        title: of the pictures: model and machine.
        cluster: as assumed; the breakdown is for its constants and the first micro-batch size.
        unknowns: see :func:`monte_carlo`.

    Returns:
        What is in ``results.json``, and the simulations.
    """
    sizes = [int(size) for size in unknowns["micro_batch"].values]
    simulations = simulate_all(jobs(sizes, cluster))
    einsums = {size: einsum_flops(configured([*MODEL_40B, f"data.micro_batch_size={size}"])) for size in sizes}
    draws = monte_carlo(simulations, einsums, cluster, unknowns, DRAWS)
    breakdown = {mode: parts(simulations[mode, sizes[0]].seconds_on(cluster)) for mode in MODES}
    results = {
        "configuration": list(MODEL_40B),
        "rank": RANK,
        "assumed": asdict(cluster),
        "breakdown_micro_batch": sizes[0],
        "breakdown_seconds": breakdown,
        "speedup_as_assumed": {mode: total(breakdown[BASELINE]) / total(breakdown[mode]) for mode in MODES},
        "flops": {mode: sum(simulations[mode, sizes[0]].flops.values()) for mode in MODES},
        "peak_gib": {f"{mode}, micro-batch {size}": peak_gib(s) for (mode, size), s in simulations.items()},
        "einsum_flops": einsums,
        "ranges": {name: asdict(unknown) for name, unknown in unknowns.items()},
        "monte_carlo": draws.summary(),
    }
    write_json(directory / "results.json", results)
    draws.write(directory / "draws.csv")
    breakdown_picture(breakdown, f"Predicted step, {title}", directory / "breakdown.png")
    speedup_picture(draws, unknowns, f"Speedup by DTD and CAC under unknown constants, {title}", directory)
    return results, simulations


def total(breakdown: Mapping[str, float]) -> float:
    """Seconds of a step."""
    return sum(breakdown.values())


def breakdown_picture(breakdown: Mapping[str, Mapping[str, float]], title: str, path: Path) -> None:
    """One bar a configuration, from its parts; change of time against the first at its end."""
    figure, (axes,) = canvas(title, size=(9, 1.6 + 0.45 * len(breakdown)))
    rows = list(breakdown)[::-1]
    left = np.zeros(len(rows))
    for part, colour in PARTS.items():
        values = np.array([breakdown[row].get(part, 0.0) for row in rows])
        axes.barh(rows, values, left=left, color=colour, edgecolor="white", lw=0.5, label=NAMES.get(part, part))
        left += values
    first = left[-1]
    for row, end in zip(rows, left, strict=True):
        change = "" if end == first else f"   ×{first / end:.2f}, {(1 - end / first) * 100:.0f} % less time"
        axes.annotate(f"{end:.1f} s{change}", (end, row), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, left.max() * 1.3)
    axes.set_xlabel("predicted seconds of a step")
    figure.legend(loc="outside lower left", ncols=4, frameon=False)
    figure.savefig(path)


def speedup_picture(draws: Draws, unknowns: Mapping[str, Unknown], title: str, directory: Path) -> None:
    """Distribution of the speedup with the paper's claim, and what it depends on."""
    figure, (left, right) = canvas(title, columns=2, size=(11, 4.4))
    speedup, summary = draws.speedup(), draws.summary()
    low, median, high = np.percentile(speedup, (5, 50, 95))
    left.hist(speedup, bins=60, color=SKY)
    left.axvspan(low, high, color=SKY, alpha=0.25, lw=0, label=f"5 to 95 %: ×{low:.2f} to ×{high:.2f}")
    left.axvline(median, color=BLUE, label=f"median ×{median:.2f}")
    for (reading, value), style in zip(READINGS.items(), ("--", ":"), strict=True):
        left.axvline(value, color=VERMILION, ls=style, label=f"the paper's {reading}")
    left.set_xlabel("time of the baseline ÷ time with DTD and CAC")
    left.set_ylabel(f"draws, of {len(speedup):,}")
    left.legend(frameon=False, fontsize=8)
    correlations = summary["rank_correlation"]
    assert isinstance(correlations, dict)
    order = sorted(correlations, key=lambda name: abs(correlations[name]))
    values = [correlations[name] for name in order]
    right.barh(
        [f"{unknowns[name].label}\n{_range(unknowns[name])}" for name in order],
        values,
        color=[VERMILION if value < 0 else GREEN for value in values],
    )
    for index, value in enumerate(values):
        right.annotate(
            f"{value:+.2f}",
            (value, index),
            xytext=(4 if value >= 0 else -4, 0),
            textcoords="offset points",
            va="center",
            ha="left" if value >= 0 else "right",
            fontsize=8,
        )
    right.axvline(0, color="black", lw=0.7)
    right.set_xlim(-1.3, 1.3)
    right.set_xlabel("rank correlation with the speedup")
    right.tick_params(axis="y", labelsize=8)
    figure.savefig(directory / "speedup.png")


def _range(unknown: Unknown) -> str:
    return " or ".join(f"{v:g}" for v in unknown.values) if unknown.choice else "{:g} to {:g}".format(*unknown.values)


def print_summary(results: Mapping[str, Any]) -> None:
    """The table of the breakdown, and how the claim lies among the draws."""
    breakdown, drawn = results["breakdown_seconds"], results["monte_carlo"]
    table = Table(title="predicted seconds of a step, constants as assumed", title_justify="left")
    table.add_column("")
    for mode in breakdown:
        table.add_column(mode, justify="right")
    for part in PARTS:
        table.add_row(NAMES.get(part, part), *(f"{seconds[part]:.1f}" for seconds in breakdown.values()))
    table.add_section()
    table.add_row("step", *(f"{total(seconds):.1f}" for seconds in breakdown.values()))
    table.add_row("speedup", *(f"×{results['speedup_as_assumed'][mode]:.2f}" for mode in breakdown))
    ranges = [f"×{s['5 %']:.2f} to ×{s['95 %']:.2f}" for s in drawn["speedup"].values()]
    table.add_row("5 to 95 % of draws", "", *ranges)
    console = Console(highlight=False)
    console.print(table)
    below = "; ".join(f"{share:.1%} are below “{what}”" for what, share in drawn["share_of_draws_below"].items())
    console.print(f"Of {drawn['draws']:,} draws the median is ×{drawn['speedup'][BOTH]['50 %']:.2f}; {below}.")
