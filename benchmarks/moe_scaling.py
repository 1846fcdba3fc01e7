"""How the time of one MoE layer grows with tokens, experts, choices and width, forward and backward, on one GPU.

Time per token should not depend on the number of tokens or experts, and grow with the number of choices and the
square of the width (the experts' inner width is half of the hidden one). See ``python -m benchmarks.moe_scaling -h``.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.moe_layer import Shape, Step, milliseconds, plant_routing, tedlab_layer, tokens
from benchmarks.surroundings import surroundings

BASE = Shape(tokens=16384, hidden=2048, inner=1024, experts=64, top_k=8)
SWEEPS = {  # values, and how time per token should grow: with this power
    "tokens": ([4096, 8192, 16384, 32768, 65536, 131072], 0),
    "experts": ([8, 16, 32, 64, 128, 256], 0),
    "top_k": ([1, 2, 4, 8], 1),
    "hidden": ([1024, 2048, 4096, 8192], 2),
}


def shape_at(name: str, value: int) -> Shape:
    """The base with one thing changed."""
    changes: dict[str, Any] = {name: value} | ({"inner": value // 2} if name == "hidden" else {})
    return replace(BASE, **changes)


def microseconds_per_token(shape: Shape, device: torch.device, repeats: int) -> float:
    """Median."""
    layer = tedlab_layer(shape, device, "auto")
    plant_routing(layer, 0.0)
    step = Step(layer, tokens(shape, device))
    for _ in range(3):
        step()
    return median(milliseconds(step, repeats)) * 1e3 / shape.tokens


def draw(times: dict[str, dict[int, float]], title: str, file: Path) -> None:
    """One picture for each sweep, with a line as it should be through the base."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (name, of_value) in zip(figure.subplots(1, len(times)), times.items(), strict=True):
        values, power = list(of_value), SWEEPS[name][1]
        base = getattr(BASE, name)
        axes.plot(values, list(of_value.values()), "o-", label="measured")
        axes.plot(
            values, [of_value[base] * (v / base) ** power for v in values], "k--", linewidth=1, label="as it should"
        )
        axes.set(xscale="log", yscale="log", xlabel=name.replace("_", "-"))
        axes.set_xticks(values, [f"{v // 1024}k" if v >= 1024 else str(v) for v in values], fontsize=8)
        axes.set_ylim(min(of_value.values()) / 3, max(of_value.values()) * 3)
        axes.minorticks_off()
    figure.axes[0].set_ylabel("µs per token")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file for the results, and beside it a PNG")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    device = torch.device("cuda")
    torch.manual_seed(0)
    times: dict[str, dict[int, float]] = {name: {} for name in SWEEPS}
    jobs = [(name, value) for name, (values, _) in SWEEPS.items() for value in values]
    for name, value in track(jobs, "Layers", transient=True):
        times[name][value] = microseconds_per_token(shape_at(name, value), device, arguments.repeats)
        torch.cuda.empty_cache()
    facts = surroundings(device)
    table = Table(title=f"One MoE layer, bf16, {facts['device']}: {BASE}", title_justify="left", box=SIMPLE_HEAD)
    for column in ("what", "value", "µs per token", "TFLOP/s"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, value in jobs:
        shape, taken = shape_at(name, value), times[name][value]
        table.add_row(name, f"{value:,}", f"{taken:.3f}", f"{shape.flops / shape.tokens / taken / 1e6:.0f}")
    Console(width=110).print(table)
    if arguments.out:
        everything = facts | {"microseconds_per_token": times}
        arguments.out.write_text(json.dumps(everything, indent=1) + "\n")
        draw(times, f"One MoE layer, forward and backward, bf16, {facts['device']}", arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
