"""``python -m experiments.routers``: see README.md."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.paper import write_json
from experiments.sweeps import SEEDS, train
from tedlab.record import Recording, flip_rates

HERE = Path(__file__).parent
RUNS = Path("runs/routers")
ROUTERS = ("none", "first_choices", "micro_batch", "sequence", "global_batch", "biases", "hash", "expert_choice")
RECORDED = tuple(router for router in ROUTERS if router != "expert_choice")  # whose tokens choose
STEPS = 200
QUANTITIES = {
    "val/loss": "validation loss",
    "train/loss": "training loss",
    "router/load_cv": "load variation",
    "router/dead_experts": "idle experts",
    "router/dropped_fraction": "dropped",
}
PERCENT = ("router/dead_experts", "router/dropped_fraction")


def main() -> None:
    """The command. Runs that have finished are kept."""
    runs = [RUNS / "sweep" / str(number) for number in range(len(ROUTERS) * len(SEEDS))]
    if not all((run / "summary.json").is_file() for run in runs):
        experiments = ",".join(f"routers/{router}" for router in ROUTERS)
        seeds = ",".join(map(str, SEEDS))
        train("-m", f"experiment={experiments}", f"seed={seeds}", f"hydra.sweep.dir={RUNS / 'sweep'}")
    results: dict[str, Any] = {}
    first_seed = runs[:: len(SEEDS)]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        flipped = list(pool.map(flips, first_seed, ROUTERS))
    for number, router in enumerate(ROUTERS):
        mine = runs[number * len(SEEDS) : (number + 1) * len(SEEDS)]
        summaries = [json.loads((run / "summary.json").read_text()) for run in mine]
        results[router] = {name: [summary[name] for summary in summaries] for name in QUANTITIES}
        results[router]["flips"] = flipped[number]
    write_json(HERE / "results.json", results)
    command = ["compare", *map(str, first_seed), "by=experiment_name", f"out={RUNS / 'report.html'}"]
    subprocess.run([sys.executable, "-m", "tedlab", *command], check=True)
    Console().print(table(results))


def flips(run: Path, router: str) -> float | None:
    """The share of choices that another precision flips: of one more step from a run's end, in fp32 and in bf16."""
    if router not in RECORDED:
        return None
    records = []
    for precision in ("32-true", "bf16-true"):
        directory = RUNS / "flips" / run.name / precision
        train(
            f"experiment=routers/{router}",
            f"ckpt_path={run}",
            f"trainer.max_steps={STEPS + 1}",
            f"trainer.precision={precision}",
            "routing.record=true",
            f"hydra.run.dir={directory}",
        )
        records.append(Recording(directory / "routing"))
    return float(flip_rates(*records)[STEPS + 1].mean())


def table(results: dict[str, Any]) -> Table:
    """Means over the seeds, and the range from the least to the largest."""
    shown = Table("router", *QUANTITIES.values(), "flips in bf16", title=f"{len(SEEDS)} seeds, {STEPS} steps")
    for router, values in results.items():
        row = [spread(values[name], percent=name in PERCENT) for name in QUANTITIES]
        shown.add_row(router, *row, "–" if values["flips"] is None else f"{values['flips']:.2%}")
    return shown


def spread(values: Sequence[float], percent: bool) -> str:
    """Writes a mean with its range."""
    mean, low, high = np.mean(values), min(values), max(values)
    return f"{mean:.2%} ({low:.2%} to {high:.2%})" if percent else f"{mean:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
