"""``python -m docs.expert_parallel``: draws experts on two GPUs (expert_parallel.png) and on four, as measured."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

FILE, FOUR = (Path(__file__).with_name(f"expert_parallel{name}.png") for name in ("", "_four"))
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PASSES = {"forward": "#0072b2", "backward": "#56b4e9"}
WAYS = {  # of rows with experts on n GPUs
    "tedlab, one GPU": ("one GPU", "#999999"),
    "tedlab, expert {n}": ("rows or slots", "#0072b2"),
    "tedlab, expert {n}, comm.dedup=rank": ("per process (rank)", "#009e73"),
    "tedlab, expert {n}, comm.dedup=group": ("gathered (group)", "#e69f00"),
}
MODELS = {
    "B": "B: Mixtral",
    "C": "C: TED 1.3 B,\nwith capacity",
    "D": "D: DeepSeek-\nV2-Lite",
    "E": "E: Qwen3-\n30B-A3B",
}
EXCHANGES = {  # of the ways of exchanges_h200.json
    "all_to_all": ("NCCL's all-to-all", "#0072b2"),
    "gather": ("NCCL's all-gather", "#56b4e9"),
    "read": ("reads of the peer's memory", "#e69f00"),
    "copy and read": ("… after a copy into it", "#f0d090"),
    "vdev": ("NVSHMEM's all-to-all", "#999999"),
}


def draw(file: Path = FILE) -> None:
    """Draws one call on two GPUs beside other frameworks, other models beside one GPU, and bare exchanges."""
    table, more = (
        json.loads((RESULTS / f"expert_parallel_{name}_h200.json").read_text()) for name in ("table", "more")
    )
    first = [row for call in table if call["call"] == "first call" for row in call["rows"]]
    others = [row for call in (*more, *table) for row in call["rows"] if row["case"] in "BCDE"]  # the last counts
    figure = Figure(figsize=(10, 6.8), layout="constrained")
    axes = figure.subplot_mosaic([["peers", "models"], ["exchanges", "exchanges"]], height_ratios=[1.2, 1])
    a = [row for row in first if row["case"] == "A" and ", expert 2" in row["name"]]
    programs(axes["peers"], a, ", expert 2", "Four blocks of OLMoE on two H200, one call")
    models(axes["models"], others, 2)
    exchanges(axes["exchanges"], json.loads((RESULTS / "exchanges_h200.json").read_text())["rows"])
    figure.savefig(file, dpi=110)


def draw_four(file: Path = FOUR) -> None:
    """Draws four GPUs: beside other frameworks, other models beside one GPU, skewed routing, and beside tensor 2."""
    calls = json.loads((RESULTS / "expert_parallel_four_h200.json").read_text())
    rows = [row for call in calls for row in call["rows"] if "profile" not in row]
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    axes = figure.subplot_mosaic([["peers", "models"], ["skewed", "tensor"]], height_ratios=[2, 1], width_ratios=[2, 3])
    expert, tensor = ", expert 4", ", tensor 2 x expert 2"
    of_one = [row for row in rows if expert in row["name"] and ", 2 " not in row["name"]]  # of one micro-batch
    a, skewed = ([row for row in of_one if row["case"] == case] for case in "AZ")
    programs(axes["peers"], a, expert, "A: four blocks of OLMoE on four H200")
    models(axes["models"], [row for row in rows if row["case"] in "BE"], 4)
    programs(axes["skewed"], skewed, expert, "Z: A with experts drawn by Zipf's law", legend=False)
    beside = [row for row in rows if row["case"] == "A" and tensor in row["name"]]
    programs(axes["tensor"], beside, tensor, "A, half the tokens: tensor 2 × expert 2", legend=False)
    figure.savefig(file, dpi=110)


def programs(axes: Axes, rows: Sequence[dict[str, Any]], layout: str, title: str, *, legend: bool = True) -> None:
    """Draws both passes of each program, whose names lose the layout."""
    taken = {row["name"].replace(layout, ""): row["phases_s"] for row in rows}
    for name, phases in sorted(taken.items(), key=lambda each: -_milliseconds(each[1])):
        start = 0.0
        for part, colour in PASSES.items():
            label = part if len(axes.patches) < len(PASSES) else None  # once
            axes.barh(name, 1e3 * phases[part], left=start, color=colour, label=label)
            start += 1e3 * phases[part]
        axes.annotate(f"{start:.1f}", (start, name), (4, 0), textcoords="offset points", va="center")
    axes.tick_params("y", labelsize=9)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)


def models(axes: Axes, rows: Sequence[dict[str, Any]], n: int) -> None:
    """Draws the time of both passes in each way on n GPUs, model by model."""
    cases = sorted({row["case"] for row in rows})
    taken = {(row["case"], row["name"]): 1e3 * row["passes_s"] for row in rows}
    present = {case: [way for way in WAYS if (case, way.format(n=n)) in taken] for case in cases}  # side by side
    for way, (label, colour) in WAYS.items():
        of = {case: ways.index(way) - (len(ways) - 1) / 2 for case, ways in present.items() if way in ways}
        places = [cases.index(case) + 0.22 * place for case, place in of.items()]
        bars = axes.bar(places, [taken[case, way.format(n=n)] for case in of], 0.21, color=colour, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    axes.set_xticks(range(len(cases)), [MODELS[case] for case in cases], fontsize=8.5)
    axes.set_title("Others, as many tokens on each GPU", loc="left", fontsize=10, fontweight="bold")
    axes.set_ylabel("ms")
    axes.margins(y=0.35)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def exchanges(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Draws how much leaves a process in a second, by the size of its buffer."""
    for way, (label, colour) in EXCHANGES.items():
        points = [(row["mib"], row["gb_per_s"]) for row in rows if row["way"] == way]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=label)
    sizes = sorted({row["mib"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_title("Bare exchanges between two H200", loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("MiB in each process")
    axes.set_ylabel("GB/s each way")
    axes.set_ylim(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right", ncols=2)


def _milliseconds(phases: dict[str, float]) -> float:
    return sum(1e3 * phases[part] for part in PASSES)


if __name__ == "__main__":
    draw()
    draw_four()
