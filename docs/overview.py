"""``python -m docs.overview``: draws overview.png: who holds what, and a step with and without DTD and CAC."""

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.folding import bracket, draw_dense, draw_experts, listed
from experiments.breakdown import NAMES, PARTS, total
from tedlab.degrees import ParallelDegrees

FILE = Path(__file__).with_name("overview.png")
STUDY = Path(__file__).parents[1] / "experiments" / "paper_breakdown" / "results.json"
SHOWN = ParallelDegrees(8, tensor=2, expert=2)


def draw(file: Path = FILE) -> None:
    """Draws eight processes twice, dense layers above experts, and below them the study's bars."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    dense, experts, step = figure.subplots(3)
    draw_dense(dense, SHOWN, "a half of each")
    bracket(dense, SHOWN, "tensor", "tensor group: sums")
    draw_experts(experts, SHOWN, "Experts: a half of each of four of eight")
    listed(experts, SHOWN, "expert", "expert groups, which exchange tokens", bottom=0.3)
    listed(experts, SHOWN, "expert_data", "expert_data groups, gradients of experts", bottom=-0.12)
    draw_step(step)
    figure.savefig(file, dpi=110)


def draw_step(axes: Axes) -> None:
    """One bar with both of the paper's optimisations and one without, of the parts of a step."""
    breakdown = json.loads(STUDY.read_text())["breakdown_seconds"]
    rows = {"with DTD and CAC": breakdown["+ both"], "without": breakdown["baseline"]}
    axes.set_title(
        "A step of the paper's 40 B model on 128 V100, predicted", loc="left", fontsize=10, fontweight="bold"
    )
    for row, seconds in rows.items():
        left = 0.0
        for part, colour in PARTS.items():
            label = NAMES.get(part, part) if row == "without" else None
            axes.barh(row, seconds[part], left=left, color=colour, edgecolor="white", linewidth=0.5, label=label)
            left += seconds[part]
        axes.annotate(f"{total(seconds):.1f} s", (left, row), (4, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.08 * total(rows["without"]))
    axes.set_xlabel("seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=7, frameon=False, fontsize=8.5)


if __name__ == "__main__":
    draw()
