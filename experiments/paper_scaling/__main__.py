"""``python -m experiments.paper_scaling``: see README.md."""

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.paper import PAPER, Job, canvas, configured, progress, simulate_all, write_json
from tedlab.compare.charts import BLUE, GREEN, ORANGE, VERMILION
from tedlab.predict.cluster import ClusterConfig, load_cluster
from tedlab.predict.estimate import estimate

HERE = Path(__file__).parent
GIB = 2**30
MODELS = {"1.3b": VERMILION, "2.7b": ORANGE, "6.7b": GREEN, "13b": BLUE}
GPUS = (32, 64, 128, 256, 512)
WEAK = {"1.3b": 32, "2.7b": 64, "6.7b": 128, "13b": 256}  # model and GPUs grow together
MODES = {"baseline": "none", "TED": "ted"}
EXPERTS = 16
CLUSTERS = {"Summit": "summit", "ThetaGPU": "thetagpu"}
USABLE = {"Summit": 14.5, "ThetaGPU": 38.0}  # GiB beside CUDA's context, NCCL's buffers and workspaces; assumed
CONFIRMED = (("Summit", "6.7b", 128), ("Summit", "13b", 256), ("ThetaGPU", "2.7b", 64), ("ThetaGPU", "6.7b", 512))


def main() -> None:
    """The command."""
    points = [(machine, model, gpus) for machine in CLUSTERS for model in MODELS for gpus in GPUS]
    rows = []
    with progress("closed form", len(points)) as bar:
        for machine, model, gpus in points:
            rows += rows_of(machine, model, gpus)
            bar.advance(bar.task_ids[0])
    with (HERE / "scaling.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    confirmed = confirm(rows)
    write_json(HERE / "results.json", {"usable_gib": USABLE, "confirmed": confirmed, "speedup": speedups(rows)})
    picture(rows)
    print_tables(rows, confirmed)


def cluster_of(machine: str) -> ClusterConfig:
    """The machine; of Summit's nodes 4 GPUs are used."""
    cluster = load_cluster(CLUSTERS[machine])
    return replace(cluster, gpus_per_node=4) if machine == "Summit" else cluster


def overrides_of(model: str, gpus: int, tensor: int, mode: str) -> tuple[str, ...]:
    """1024 sequences a step, one in a micro-batch, 16 experts over as many ranks as there are."""
    expert = min(EXPERTS, gpus // tensor)
    layout = (f"parallel.world_size={gpus}", f"parallel.tensor={tensor}", f"parallel.expert={expert}")
    return (*PAPER, f"model=gpt_{model}", "moe=paper16", *layout, f"comm={MODES[mode]}", "data.micro_batch_size=1")


def rows_of(machine: str, model: str, gpus: int) -> list[dict[str, Any]]:
    """Both modes in the smallest tensor degree that fits; none if no degree does."""
    cluster = cluster_of(machine)
    for tensor in (1, 2, 4, 8):
        estimates = {m: estimate(configured(overrides_of(model, gpus, tensor, m)), cluster) for m in MODES}
        if max(each.memory.total for each in estimates.values()) <= USABLE[machine] * GIB:
            return [
                {
                    "machine": machine,
                    "model": model,
                    "gpus": gpus,
                    "tensor": tensor,
                    "mode": mode,
                    "seconds": each.step_seconds,
                    "tokens_per_second": each.tokens_per_second,
                    "tflops_per_gpu": each.flops / each.step_seconds / 1e12,
                    "peak_gib": each.memory.total / GIB,
                }
                for mode, each in estimates.items()
            ]
    return []


def speedups(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of TED over the baseline, by machine, model and GPUs."""
    seconds = {(row["machine"], row["model"], row["gpus"], row["mode"]): row["seconds"] for row in rows}
    return {
        f"{machine}, {model}, {gpus}": taken / seconds[machine, model, gpus, "TED"]
        for (machine, model, gpus, mode), taken in seconds.items()
        if mode == "baseline"
    }


def confirm(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds of a step by closed form and by simulation, of some points."""
    chosen = [row for row in rows if (row["machine"], row["model"], row["gpus"]) in CONFIRMED]
    jobs = {
        f"{row['machine']}, {row['model']}, {row['gpus']} GPUs, tensor {row['tensor']}, {row['mode']}": Job(
            overrides_of(row["model"], row["gpus"], row["tensor"], row["mode"]), cluster_of(row["machine"])
        )
        for row in chosen
    }
    simulations = simulate_all(jobs)
    return {
        name: {"closed_form": row["seconds"], "simulated": simulations[name].step_seconds}
        for name, row in zip(jobs, chosen, strict=True)
    }


def picture(rows: Sequence[Mapping[str, Any]]) -> None:
    """Strong scaling on both machines, and weak scaling."""
    figure, axes = canvas("Predicted scaling, 16 experts, 1,024 sequences a step", columns=3, size=(14, 4.8))
    for each, machine in zip(axes, CLUSTERS, strict=False):
        for model, colour in MODELS.items():
            for mode, style in (("baseline", ":"), ("TED", "-")):
                shown = [r for r in rows if (r["machine"], r["model"], r["mode"]) == (machine, model, mode)]
                label = f"{model.replace('b', ' B')}, {mode}"
                points = [[row[name] for row in shown] for name in ("gpus", "seconds")]
                each.plot(*points, color=colour, ls=style, marker="o", ms=4, label=label)
                if mode == "TED":
                    for row in shown:
                        each.annotate(
                            f"T{int(row['tensor'])}",
                            (row["gpus"], row["seconds"]),
                            xytext=(0, -11),
                            textcoords="offset points",
                            ha="center",
                            fontsize=7,
                            color=colour,
                        )
        each.set_title(f"strong scaling, {machine}", fontsize=10)
        each.set_yscale("log", base=2)
        each.yaxis.set_major_formatter("{x:g}")
        each.set_ylabel("seconds of a step")
        each.legend(frameon=False, fontsize=7, ncols=2, loc="upper right")
        each.set_ylim(each.get_ylim()[0] * 0.8, each.get_ylim()[1] * 2)
        each.set_xscale("log", base=2)
        each.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
        each.set_xlabel("GPUs")
    weak = axes[2]
    for machine, colour in zip(CLUSTERS, (BLUE, VERMILION), strict=True):
        for mode, style in (("baseline", ":"), ("TED", "-")):
            shown = weak_rows(rows, machine, mode)
            places = [list(WEAK).index(row["model"]) for row in shown]
            values = [row["tflops_per_gpu"] for row in shown]
            weak.plot(places, values, color=colour, ls=style, marker="o", ms=4, label=f"{machine}, {mode}")
    weak.set_title("weak scaling", fontsize=10)
    weak.set_xticks(range(len(WEAK)), [f"{model.replace('b', ' B')}\n{gpus}" for model, gpus in WEAK.items()])
    weak.set_xlabel("base model, GPUs")
    weak.set_ylabel("model TFLOP/s per GPU")
    weak.set_ylim(0)
    weak.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "scaling.png")


def weak_rows(rows: Sequence[Mapping[str, Any]], machine: str, mode: str) -> list[Mapping[str, Any]]:
    """Those whose model and GPUs grow together."""
    return [
        row for row in rows if (row["machine"], row["mode"]) == (machine, mode) and WEAK[row["model"]] == row["gpus"]
    ]


def print_tables(rows: Sequence[Mapping[str, Any]], confirmed: Mapping[str, Mapping[str, float]]) -> None:
    """Speedups, and the points that were simulated."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for machine in CLUSTERS:
        table = Table(title=f"{machine}: baseline → TED, seconds of a step", title_justify="left")
        for column in ("base", *(f"{gpus} GPUs" for gpus in GPUS)):
            table.add_column(column, justify="right")
        for model in MODELS:
            table.add_row(model.replace("b", " B"), *(cell(rows, machine, model, gpus) for gpus in GPUS))
        console.print(table)
    table = Table(title="seconds of a step", title_justify="left")
    for column in ("", "closed form", "simulated"):
        table.add_column(column)
    for name, both in confirmed.items():
        table.add_row(name, f"{both['closed_form']:.2f}", f"{both['simulated']:.2f}")
    console.print(table)


def cell(rows: Sequence[Mapping[str, Any]], machine: str, model: str, gpus: int) -> str:
    """Times, speedup and tensor degree of a point; a dash if the model does not fit."""
    found = [row for row in rows if (row["machine"], row["model"], row["gpus"]) == (machine, model, gpus)]
    if not found:
        return "–"
    baseline, ted = (row["seconds"] for row in found)
    return f"{baseline:.1f} → {ted:.1f} (×{baseline / ted:.2f}, T{int(found[0]['tensor'])})"


if __name__ == "__main__":
    main()
