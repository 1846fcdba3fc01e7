"""``python -m experiments.paper_real``: see README.md."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from experiments.breakdown import NAMES
from experiments.paper import MODES, canvas, write_json
from tedlab.comm import TRAINING_PHASES
from tedlab.compare.charts import BLUE, ORANGE
from tedlab.config import TrainConfig
from tedlab.predict.cluster import load_cluster
from tedlab.predict.sim import simulate

HERE = Path(__file__).parent
RUNS = Path("runs/paper_real")
PER_NODE, DILATION = 2, 2000
OVERRIDES = (
    "experiment=ablation_comm",  # sweeps the four toggles; recomputes all of a block; emulates Summit
    "parallel=tp2_ep4",
    "model.hidden=256",
    "model.ffn=1024",
    "model.sequence_length=256",
    "data.batch_size=16",
    "data.micro_batch_size=4",
    "data.validation_samples=16",
    "comm.skip_dead_gemm=false",
    "comm.ledger.time=true",
    f"comm.emulate_ranks_per_node={PER_NODE}",
    f"comm.emulate_dilation={DILATION}",
    "trainer.max_steps=8",
    "logger=none",
    "~logger.wandb",
    f"hydra.sweep.dir={RUNS}",
)
EMULATED = ("comm/link/in_node/emulated_seconds", "comm/link/between_nodes/emulated_seconds")
OPERATIONS = ("all_reduce", "all_to_all", "all_gather", "reduce_scatter")


def main() -> None:
    """The command."""
    subprocess.run([sys.executable, "-m", "tedlab.train", "-m", *OVERRIDES], check=True)
    results = {}
    for number, mode in enumerate(MODES):
        run = RUNS / str(number)
        summary = json.loads((run / "summary.json").read_text())
        results[mode] = {
            "loss": summary["train/loss"],
            "step_seconds": summary["perf/step_time_s"],
            "emulated_seconds": DILATION * sum(summary[key] for key in EMULATED) / summary["comm/steps"],
            "measured": measured(summary),
            "simulated": simulated_as(run),
        }
    write_json(HERE / "results.json", {"overrides": list(OVERRIDES), "dilation": DILATION, "modes": results})
    picture(results)
    print_table(results)


def measured(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What the first process sent in a step, and for how long, by operation: bytes, and seconds of the slow network."""
    return {
        op: {
            quantity: sum(
                value / summary["comm/steps"]
                for key, value in summary.items()
                if key.startswith("comm/")
                and key.endswith(f"/{op}/{quantity}")
                and key.split("/")[1] in TRAINING_PHASES
            )
            for quantity in ("wire_bytes", "seconds")
        }
        for op in OPERATIONS
    }


def simulated_as(run: Path) -> dict[str, dict[str, float]]:
    """The same of a simulation of the run's own configuration, on Summit with so few GPUs a node."""
    config = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(run / "config.yaml"))
    )
    assert isinstance(config, TrainConfig)
    ledger = simulate(config, replace(load_cluster("summit"), gpus_per_node=PER_NODE)).ledger
    return {
        op: {
            "wire_bytes": sum(count.wire_bytes for entry, count in ledger.items() if entry.op == op),
            "seconds": DILATION * sum(count.seconds for entry, count in ledger.items() if entry.op == op),
        }
        for op in OPERATIONS
    }


def total(operations: Mapping[str, Mapping[str, float]], quantity: str) -> float:
    """Over all operations."""
    return sum(values[quantity] for values in operations.values())


def picture(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Measured beside simulated: bytes, and time relative to the baseline's."""
    figure, (left, right) = canvas("Eight CPU processes behind Summit's links, emulated", columns=2, size=(10, 4))
    places = np.arange(len(results))
    for offset, (kind, colour) in zip((-0.2, 0.2), {"measured": BLUE, "simulated": ORANGE}.items(), strict=True):
        sent = [total(mode[kind], "wire_bytes") / 2**20 for mode in results.values()]
        left.bar(places + offset, sent, 0.4, color=colour, label=kind)
        seconds = [total(mode[kind], "seconds") for mode in results.values()]
        bars = right.bar(places + offset, seconds, 0.4, color=colour, label=kind)
        right.bar_label(bars, [f"{value / seconds[0]:.2f}" for value in seconds], fontsize=8)
    for axes, label in ((left, "sent by a process in a step, MiB"), (right, "in collectives, seconds a step")):
        axes.set_xticks(places, list(results))
        axes.set_ylabel(label)
    right.set_title("above the bars: of the baseline's", fontsize=9)
    left.legend(frameon=False)
    left.set_ylim(0, left.get_ylim()[1] * 1.2)
    figure.savefig(HERE / "measured.png")


def print_table(results: Mapping[str, Mapping[str, Any]]) -> None:
    """By operation."""
    table = Table(title="a step: measured / simulated", title_justify="left")
    for column in (
        "",
        *(f"{NAMES.get(op, 'reduce-scatter')}, MiB" for op in OPERATIONS),
        "collectives, s",
        "step, s",
    ):
        table.add_column(column, justify="right")
    for name, mode in results.items():
        both = (mode["measured"], mode["simulated"])
        table.add_row(
            name,
            *(" / ".join(f"{kind[op]['wire_bytes'] / 2**20:.2f}" for kind in both) for op in OPERATIONS),
            " / ".join(f"{total(kind, 'seconds'):.2f}" for kind in both),
            f"{mode['step_seconds']:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


if __name__ == "__main__":
    main()
