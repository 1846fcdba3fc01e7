"""``python -m docs.expert_parallel``: draws expert_parallel.png, experts on two GPUs, from what was measured."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

FILE = Path(__file__).with_name("expert_parallel.png")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PASSES = {"forward": "#0072b2", "backward": "#56b4e9"}
WAYS = {  # of the rows of expert_parallel_more_h200.json
    "tedlab, one GPU": ("one GPU", "#999999"),
    "tedlab, expert 2": ("rows", "#0072b2"),
    "tedlab, expert 2, comm.dedup=rank": ("tokens once for each process (rank)", "#009e73"),
    "tedlab, expert 2, comm.dedup=group": ("tokens gathered (group)", "#e69f00"),
}


def draw(file: Path = FILE) -> None:
    """Draws one call beside other frameworks, and other models beside one GPU."""
    one_call = json.loads((RESULTS / "expert_parallel_h200.json").read_text())["rows"]
    more = json.loads((RESULTS / "expert_parallel_more_h200.json").read_text())
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    peers(left, [row for row in one_call if row["case"] == "A" and row["name"] != "tedlab, tensor 2"])
    models(right, [row for call in more for row in call["rows"] if row["case"] in "CDE"])
    figure.savefig(file, dpi=110)


def peers(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Draws both passes of each program, of several measurements the first."""
    first: dict[str, dict[str, float]] = {}
    for row in rows:
        first.setdefault(", ".join([row["name"].removesuffix(", expert 2"), *row["dedup"]]), row["phases_s"])
    for name, phases in sorted(first.items(), key=lambda each: -_milliseconds(each[1])):
        start = 0.0
        for part, colour in PASSES.items():
            label = part if len(axes.patches) < len(PASSES) else None  # once
            axes.barh(name, 1e3 * phases[part], left=start, color=colour, label=label)
            start += 1e3 * phases[part]
        axes.annotate(f"{start:.0f}", (start, name), (4, 0), textcoords="offset points", va="center")
    axes.set_title("Four blocks of OLMoE on two H200, one call", loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)


def models(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the time of both passes in each way, model by model."""
    names = {"C": "C: TED 1.3 B,\nwith capacity", "D": "D: DeepSeek-\nV2-Lite", "E": "E: Qwen3-\n30B-A3B"}
    for number, (way, (label, colour)) in enumerate(WAYS.items()):
        taken = {row["case"]: 1e3 * row["passes_s"] for row in rows if row["name"] == way}
        places = [list(names).index(case) + 0.2 * (number - 1.5) for case in taken]
        bars = axes.bar(places, list(taken.values()), 0.19, color=colour, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=7.5, padding=1)
    axes.set_xticks(range(len(names)), list(names.values()), fontsize=8.5)
    axes.set_title("Other models, as many tokens on each GPU", loc="left", fontsize=10, fontweight="bold")
    axes.set_ylabel("ms")
    axes.margins(y=0.35)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def _milliseconds(phases: dict[str, float]) -> float:
    return sum(1e3 * phases[part] for part in PASSES)


if __name__ == "__main__":
    draw()
