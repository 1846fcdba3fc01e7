"""``python -m experiments.paper_memory``: see README.md."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.paper import Job, canvas, composed, configured, peak_gib, progress, simulate_all, write_json
from tedlab.compare.charts import BLUE, GREEN, ORANGE, PURPLE, VERMILION
from tedlab.config import TrainConfig
from tedlab.predict.cluster import load_cluster
from tedlab.predict.estimate import estimate
from tedlab.predict.estimate.memory import Memory, Moment
from tedlab.predict.volumes import ClosedForm
from tedlab.validate import complete_simulated

HERE = Path(__file__).parent
GIB = 2**30
USABLE = 14.5  # GiB: of 15.8, what is left beside CUDA's context, NCCL's buffers and workspaces; assumed
GPUS = (32, 64, 128, 256, 512, 1024)
TENSOR = {1: VERMILION, 2: ORANGE, 4: GREEN, 8: BLUE}
EXPERTS = {4: ":", 16: "-", 128: "--"}
GPT3 = {"1.3 B": 1.316e9, "2.7 B": 2.652e9, "6.7 B": 6.658e9, "13 B": 12.85e9}  # parameters, with embeddings
LAYERS = {768: 12, 1024: 24, 2048: 24, 2560: 32, 4096: 32, 5120: 40, 12288: 96}  # of GPT-3's, by hidden size
COMMON = (
    "trainer.precision=16-true",
    "model.recompute.granularity=block",
    "moe=paper16",
    "moe.capacity_factor=1",
    "comm=ted",
    "data.micro_batch_size=1",
)
STEP = ("model=gpt_6.7b", "parallel.world_size=128", "parallel.tensor=4", "data.batch_size=32")
EXPERTS_OF_STEP = (4, 8, 16, 32, 64, 128)
ONE_BUCKET = "optim.bucket_elements=1000000000000"
OPTIMIZERS = {
    "untiled": ("optim.tile=null", ONE_BUCKET),
    "untiled, in tedlab's buckets": ("optim.tile=null",),
    "tiles of 1.8 M": ("optim.tile=1800000",),
}


def main() -> None:
    """The command."""
    rows = largest_models()
    with (HERE / "largest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    steps = {name: [optimizer_step(experts, own) for experts in EXPERTS_OF_STEP] for name, own in OPTIMIZERS.items()}
    confirmed = confirm(rows)
    write_json(HERE / "results.json", {"usable_gib": USABLE, "optimizer_step": steps, "confirmed": confirmed})
    largest_picture(rows)
    optimizer_picture(steps)
    print_tables(rows, confirmed)


# ---- the largest base model ----------------------------------------------------------------------------------------


def layers_of(hidden: int) -> int:
    """Of a model this wide: between GPT-3's, an even number."""
    return 2 * round(float(np.interp(hidden, list(LAYERS), list(LAYERS.values()))) / 2)


def base_parameters(hidden: int) -> float:
    """Of the base model: blocks, embeddings of tokens and positions."""
    return layers_of(hidden) * (12.0 * hidden**2 + 13 * hidden) + (50304 + 2048 + 2) * hidden


def overrides_of(hidden: int, gpus: int, tensor: int, experts: int) -> list[str]:
    """A model of this family in a layout: one micro-batch a step, experts over as many ranks as there are."""
    model = [f"model.hidden={hidden}", f"model.ffn={4 * hidden}", f"model.layers={layers_of(hidden)}"]
    layout = [f"parallel.world_size={gpus}", f"parallel.tensor={tensor}"]
    expert = [f"parallel.expert={min(experts, gpus // tensor)}", f"moe.num_experts={experts}"]
    return [*COMMON, "model=gpt_6.7b", *model, *layout, *expert, f"data.batch_size={gpus // tensor}"]


def largest_hidden(template: TrainConfig, accumulated: int = 1) -> int:
    """The widest model of the family that fits, a multiple of 32."""
    low, high = 8, 512  # in 32 channels; the first fits, the second does not
    while high - low > 1:
        middle = (low + high) // 2
        hidden = 32 * middle
        model = replace(template.model, hidden=hidden, ffn=4 * hidden, layers=layers_of(hidden))
        data = replace(template.data, batch_size=template.data.batch_size * accumulated)
        config = complete_simulated(replace(template, model=model, data=data))
        fits = Memory(ClosedForm(config)).peak().total <= USABLE * GIB
        low, high = (middle, high) if fits else (low, middle)
    return 32 * low


def largest_models() -> list[dict[str, float]]:
    """For all numbers of GPUs and experts, and tensor degrees; with several micro-batches a step, too."""
    cases = [(gpus, tensor, experts) for experts in EXPERTS for gpus in GPUS for tensor in TENSOR]
    rows = []
    with progress("largest models", len(cases)) as bar:
        for gpus, tensor, experts in cases:
            template = composed(overrides_of(1024, gpus, tensor, experts))
            hidden = largest_hidden(template)
            rows.append(
                {
                    "gpus": gpus,
                    "tensor": tensor,
                    "experts": experts,
                    "hidden": hidden,
                    "layers": layers_of(hidden),
                    "base_parameters": base_parameters(hidden),
                    "base_parameters_if_accumulating": base_parameters(largest_hidden(template, accumulated=2)),
                }
            )
            bar.advance(bar.task_ids[0])
    return rows


def ratios(rows: Sequence[Mapping[str, float]], experts: int, tensor: int) -> dict[int, float]:
    """Largest base model ÷ that without tensor parallelism, by number of GPUs."""
    largest = {(row["gpus"], row["tensor"]): row["base_parameters"] for row in rows if row["experts"] == experts}
    return {gpus: largest[gpus, tensor] / largest[gpus, 1] for gpus in GPUS}


# ---- the optimizer step --------------------------------------------------------------------------------------------


def optimizer_step(experts: int, own: Sequence[str]) -> dict[str, float]:
    """GiB of the 6.7 B base's optimizer step on 128 GPUs, its temporaries, and the fullest moment before it."""
    moments = list(Memory(ClosedForm(configured(step_overrides(experts, own)))).at_moments())
    step = next(moment for moment in moments if moment.name == "optimizer step")
    before = (moment for moment in moments if not _belongs_to_step(moment))
    return {
        "experts": experts,
        "spike": step.held["temporaries"] / GIB,
        "optimizer_step": step.total / GIB,
        "passes": max(moment.total for moment in before) / GIB,
    }


def step_overrides(experts: int, own: Sequence[str]) -> list[str]:
    """The configuration of such a step."""
    return [*COMMON, *STEP, f"moe.num_experts={experts}", f"parallel.expert={min(experts, 32)}", *own]


def _belongs_to_step(moment: Moment) -> bool:
    return moment.name in ("optimizer step", "reduction of gradients")


# ---- confirmation --------------------------------------------------------------------------------------------------


def confirm(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Memory by closed form and by simulation, of some points of both figures: the peak, if nothing else is said."""
    points = {
        f"{gpus} GPUs, tensor {tensor}, {experts} experts": overrides_of(int(row["hidden"]), gpus, tensor, experts)
        for gpus, tensor, experts in ((128, 1, 16), (128, 4, 16), (512, 8, 16), (512, 4, 4))
        for row in rows
        if (row["gpus"], row["tensor"], row["experts"]) == (gpus, tensor, experts)
    }
    untiled, tiled = "6.7 B × 16, temporaries of the untiled step", "6.7 B × 16, tiles of 1.8 M"
    points |= {untiled: step_overrides(16, OPTIMIZERS["untiled"]), tiled: step_overrides(16, ())}
    summit = load_cluster("summit")
    simulations = simulate_all({name: Job(overrides, summit) for name, overrides in points.items()})
    confirmed = {
        name: {
            "closed_form_gib": estimate(configured(points[name]), summit).memory.total / GIB,
            "simulated_gib": peak_gib(simulation),
        }
        for name, simulation in simulations.items()
    }
    # Its peak is another: that of a single bucket's reduction.
    confirmed[untiled] = {
        "closed_form_gib": optimizer_step(16, OPTIMIZERS["untiled"])["spike"],
        "simulated_gib": float(simulations[untiled].memory.held["temporaries"].max()) / GIB,
    }
    return confirmed


# ---- pictures ------------------------------------------------------------------------------------------------------


def largest_picture(rows: Sequence[Mapping[str, float]]) -> None:
    """Largest base model, and its ratio to that without tensor parallelism, by number of GPUs."""
    figure, (left, right) = canvas("Largest base model on V100s with 16 GB", columns=2, size=(11, 4.8))
    for tensor, colour in TENSOR.items():
        sizes = [row["base_parameters"] / 1e9 for row in rows if (row["tensor"], row["experts"]) == (tensor, 16)]
        left.plot(GPUS, sizes, color=colour, marker="o", ms=4, label=f"tensor {tensor}" if tensor > 1 else "without")
    for name, size in GPT3.items():
        left.axhline(size / 1e9, color="black", lw=0.5, ls=":")
        left.annotate(f" GPT-3 {name}", (1, size / 1e9), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    left.set_yscale("log")
    left.set_yticks([2, 3, 5, 10, 20], ["2", "3", "5", "10", "20"])
    left.minorticks_off()
    left.set_ylabel("parameters of the base model, in billions (16 experts)")
    left.legend(framealpha=1, edgecolor="none", title="tensor parallelism", loc="upper left")
    for experts, style in EXPERTS.items():
        for tensor in (4, 8):
            values = list(ratios(rows, experts, tensor).values())
            label = f"tensor {tensor}, {experts} experts"
            right.plot(GPUS, values, color=TENSOR[tensor], ls=style, marker="o", ms=3, label=label)
    right.axhspan(4, 8, color=PURPLE, alpha=0.15, lw=0, label="the paper's 4 to 8 times")
    right.set_ylabel("times as large as without tensor parallelism")
    right.set_ylim(0, 10)
    right.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
        axes.set_xlabel("GPUs")
    figure.savefig(HERE / "largest.png")


def optimizer_picture(steps: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Temporaries of the optimizer step, and its peak beside that of the passes, by number of experts."""
    title = "Memory of the optimizer step, 6.7 B base on 128 V100, tensor 4"
    figure, (left, right) = canvas(title, columns=2, size=(11, 4.4))
    for (name, values), colour in zip(steps.items(), (VERMILION, ORANGE, BLUE), strict=True):
        left.plot(EXPERTS_OF_STEP, [v["spike"] for v in values], color=colour, marker="o", ms=4, label=name)
        right.plot(EXPERTS_OF_STEP, [v["optimizer_step"] for v in values], color=colour, marker="o", ms=4, label=name)
    passes = [v["passes"] for v in steps["untiled"]]
    right.plot(EXPERTS_OF_STEP, passes, color="black", ls="--", lw=1, label="forward and backward passes")
    right.axhline(USABLE, color="black", ls=":", lw=1, label="usable of 16 GB")
    left.set_yscale("log")
    left.set_ylabel("temporaries of the step, GiB")
    right.set_ylabel("memory at its fullest, GiB")
    right.set_ylim(0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(EXPERTS_OF_STEP, [str(experts) for experts in EXPERTS_OF_STEP])
        axes.set_xlabel("experts")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "optimizer_step.png")


def print_tables(rows: Sequence[Mapping[str, float]], confirmed: Mapping[str, Mapping[str, float]]) -> None:
    """The largest models, and the points that were simulated."""
    console = Console(highlight=False)
    table = Table(title="largest base model that fits, billions of parameters, 16 experts", title_justify="left")
    for column in ("GPUs", *(f"tensor {tensor}" for tensor in TENSOR), "tensor 4 ÷ 1", "tensor 8 ÷ 1"):
        table.add_column(column, justify="right")
    for row in largest_table(rows, 16):
        table.add_row(*row)
    console.print(table)
    table = Table(title="confirmation, GiB", title_justify="left")
    for column in ("", "closed form", "simulated"):
        table.add_column(column)
    for name, both in confirmed.items():
        table.add_row(name, f"{both['closed_form_gib']:.2f}", f"{both['simulated_gib']:.2f}")
    console.print(table)


def largest_table(rows: Sequence[Mapping[str, Any]], experts: int) -> Iterator[list[str]]:
    """Its rows, as text."""
    for gpus in GPUS:
        found = [row["base_parameters"] for row in rows if (row["gpus"], row["experts"]) == (gpus, experts)]
        times = [f"{ratios(rows, experts, tensor)[gpus]:.1f}" for tensor in (4, 8)]
        yield [str(gpus), *(f"{size / 1e9:.1f}" for size in found), *times]


if __name__ == "__main__":
    main()
