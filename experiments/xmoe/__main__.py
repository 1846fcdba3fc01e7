"""``python -m experiments.xmoe``: see README.md. All numbers are predicted, none was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb, prod
from pathlib import Path
from typing import Any

from matplotlib.patches import Patch
from rich.console import Console
from rich.table import Table

from experiments.paper import Job, canvas, composed, configured, peak_gib, simulate_all, write_json
from experiments.uncertainty import einsum_flops
from tedlab.compare.charts import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
from tedlab.config import TrainConfig
from tedlab.models import models
from tedlab.moe import MoESpec
from tedlab.predict.cluster import load_cluster
from tedlab.predict.estimate import Estimate, estimate
from tedlab.predict.volumes import ClosedForm

HERE = Path(__file__).parent
GIB = 2**30
FRONTIER = load_cluster("frontier")

# ---- X-MoE on Frontier ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model of the paper, as in the scripts that were released with it, and how it is laid out here.

    Attributes:
        layers, hidden, ffn, heads, experts, top_k, length: Its sizes; every block has experts.
        tensor: The tensor degree of the layouts that have one.
        holders: How many processes hold all experts together, in every layout.
        micro_batch: Samples of a micro-batch.
        samples: Samples of a step, per process.
        worlds: Numbers of processes.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    experts: int
    top_k: int
    length: int
    tensor: int
    holders: int
    micro_batch: int
    samples: int
    worlds: tuple[int, ...]

    def sizes(self) -> tuple[str, ...]:
        """Returns the overrides that make the model."""
        return (
            *(f"model.layers={self.layers}", f"model.hidden={self.hidden}", f"model.ffn={self.ffn}"),
            *(f"model.heads={self.heads}", f"model.sequence_length={self.length}", "model.positions=rotary"),
            *("model.vocab_size=50304", f"moe.num_experts={self.experts}", f"moe.top_k={self.top_k}", "moe.every=1"),
            *("moe.capacity_factor=1.25", "trainer=gpu", "trainer.precision=16-true", "optim.tile=fused"),
        )


MODELS = {
    "Small": Model(28, 2048, 1408, 16, 64, 6, 2048, 2, 8, 4, 32, (8, 64, 256, 1024)),
    "Medium": Model(28, 5120, 1536, 128, 128, 6, 4096, 2, 64, 1, 4, (64, 256, 1024)),
    "Large": Model(28, 7168, 2048, 128, 256, 8, 4096, 2, 128, 1, 4, (256, 1024)),
    "Super": Model(61, 7168, 2560, 128, 256, 8, 4096, 8, 256, 1, 1, (1024,)),
}


@dataclass(frozen=True)
class System:
    """A way to train them.

    Attributes:
        overrides: Its settings besides degrees.
        tensor: Whether it has a tensor degree.
        whole: Whether experts stay whole.
    """

    overrides: tuple[str, ...]
    tensor: bool = True
    whole: bool = True

    def layout(self, model: Model, world: int) -> tuple[str, ...]:
        """Returns the overrides that lay a model out."""
        tensor = model.tensor if self.tensor else 1
        return (
            *(f"parallel.world_size={world}", f"parallel.tensor={tensor}"),
            *(f"parallel.expert={model.holders if self.whole else model.holders // tensor}",),
            *(("parallel.expert_tensor=1",) if self.whole and self.tensor else ()),
            *(f"data.batch_size={model.samples * world}", f"data.micro_batch_size={model.micro_batch}"),
            *self.overrides,
        )


ROWS = "moe.dispatch=packed"
ONCE = ("moe.dispatch=dropless", "comm.dedup=node", "comm.ranks_per_node=8")  # redundancy-bypassing dispatch
SLICED = ("moe.slice=tokens",)
SYSTEMS = {
    "Tutel-like": System((), tensor=False),
    "rows": System((ROWS,), tensor=False),
    "rows, once a node": System(ONCE, tensor=False),
    "TED": System(("comm.dtd=true",), whole=False),
    "TED, rows": System(("comm.dtd=true", ROWS), whole=False),
    "folded, rows": System(("comm.dtd=true", ROWS)),
    "SSMB": System(SLICED),
    "SSMB, rows": System((*SLICED, ROWS)),
    "SSMB, rows, once a node": System((*SLICED, *ONCE)),  # X-MoE's own
}
THEIRS = ("parallel.world_size=256", "data.batch_size=1024", "data.micro_batch_size=1")
AS_RUN: Mapping[str, tuple[str, ...]] = {  # Medium on 256 GCDs, by the scripts
    "TED": (*THEIRS, "parallel.tensor=2", "parallel.expert=128", "comm.dtd=true"),
    "Tutel": (*THEIRS, "parallel.tensor=1", "parallel.expert=64"),
    "X-MoE without RBD": (*THEIRS, "parallel.tensor=1", "parallel.expert=64", ROWS),
    "X-MoE": (*THEIRS, "parallel.tensor=1", "parallel.expert=64", *ONCE),
}
REPORTED: Mapping[str, Any] = {  # arXiv 2508.13337 and its repository; B are 2^30
    "parameters": {"Small": 10.1, "Medium": 55.2, "Large": 201.4, "Super": 545.4},
    "over": {"TED": 5.15, "Tutel": 1.42},
    "layer_gb": {"slots": 1.95, "rows": 1.21},
    "super_pflops": 10.44,
}


def predicted(overrides: tuple[str, ...], cluster: Any = FRONTIER) -> tuple[TrainConfig, Estimate]:
    """Returns a configuration with its estimate."""
    config = configured(overrides)
    return config, estimate(config, cluster)


def numbers(found: Estimate) -> dict[str, float]:
    """Returns what is shown of an estimate."""
    return {
        "memory_gib": found.memory.total / GIB,
        "between_nodes_gb": found.wire["between_nodes"] / 1e9,
        "in_node_gb": found.wire["in_node"] / 1e9,
        "step_s": found.step_seconds,
        "tflops": found.flops / found.step_seconds / 1e12,
    }


def on_frontier() -> dict[str, dict[str, dict[str, float]]]:
    """Returns the predictions for each model on each number of processes, by system."""
    return {
        f"{name}, {world}": {
            system: numbers(predicted((*model.sizes(), *how.layout(model, world)))[1])
            for system, how in SYSTEMS.items()
        }
        for name, model in MODELS.items()
        for world in model.worlds
    }


def as_run() -> dict[str, dict[str, float]]:
    """Returns the predictions for the layouts whose steps the paper compares, and one with DeepSpeed's dense masks."""
    found: dict[str, dict[str, float]] = {}
    for name, layout in AS_RUN.items():
        config, result = predicted((*MODELS["Medium"].sizes(), *layout))
        found[name] = numbers(result)
        if name == "TED":
            seconds = einsum_flops(config) / (FRONTIER.peak_flops.fp16 * FRONTIER.efficiency.gemm)
            slower = result.step_seconds + seconds
            useful = result.flops / slower / 1e12
            found["TED, dense masks"] = {**found[name], "step_s": slower, "tflops": useful}
    return found


def parameters(name: str) -> float:
    """Returns the parameters of a model without its table of tokens, in units of 2^30 as the paper counts them."""
    config = composed(MODELS[name].sizes())
    spec = models[config.model.architecture].spec(config.model, config.moe)
    return sum(prod(p.shape) for p in spec.parameters() if not p.name.startswith("embedding.")) / GIB


def layer_gb(*overrides: str) -> float:
    """Returns the GB that experts, their exchange and gates keep of one layer of Large in one process."""
    layout = ("parallel.world_size=256", "parallel.tensor=1", "parallel.expert=64", "data.batch_size=256")
    form = ClosedForm(configured((*MODELS["Large"].sizes(), *layout, "data.micro_batch_size=1", *overrides)))
    layer, batch = form.spec.blocks[0].feed_forward, form.at(0)
    assert isinstance(layer, MoESpec)
    return (layer.saved(batch) - layer.router.saved(batch)) / 1e9


def distinct(experts: int, top_k: int, nodes: int) -> float:
    """Returns on how many nodes the choices of a token are, on average, if all sets of experts are equally likely."""
    return nodes * (1 - comb(experts - experts // nodes, top_k) / comb(experts, top_k))


# ---- Parallel folding on DGX H100 ----------------------------------------------------------------------------------

H100 = load_cluster("dgx_h100")
EIGHT = (
    *("preset=mixtral_8x22b", "trainer=gpu", "trainer.precision=bf16-true", "optim.tile=fused"),
    *("moe.dispatch=capacity", "moe.capacity_factor=1", "parallel.sequence=true", "optim.overlap=true"),
)
FINE = (*EIGHT, "moe.num_experts=64", "moe.top_k=8", "moe.ffn=2048")  # 8x22B-G8T8


@dataclass(frozen=True)
class Row:
    """A row of the paper's tables, or one beside it.

    Attributes:
        model, world, batch: What is trained: overrides, GPUs, samples of a step.
        tensor, expert, expert_tensor: Its degrees.
        reported: The reported MFU in percent; None: nothing is reported for it.
    """

    model: tuple[str, ...]
    world: int
    batch: int
    tensor: int
    expert: int
    expert_tensor: int
    reported: float | None = None

    def overrides(self) -> tuple[str, ...]:
        """Returns the overrides that make it."""
        return (
            *self.model,
            *(f"parallel.world_size={self.world}", f"parallel.tensor={self.tensor}", f"parallel.expert={self.expert}"),
            *(f"parallel.expert_tensor={self.expert_tensor}", f"data.batch_size={self.batch}"),
            "data.micro_batch_size=1",
        )


FOLDING = {  # arXiv 2504.14960, table 1 and strong scaling; FSDP and pipelines are left out
    "8x22B, TP4 EP8": Row(EIGHT, 128, 256, 4, 8, 4, 36.6),
    "8x22B, folded TP4 EP8 ETP1": Row(EIGHT, 128, 256, 4, 8, 1),
    "8x22B, folded TP4 EP8 ETP2": Row(EIGHT, 128, 256, 4, 8, 2),
    "G8T8, TP8 EP8": Row(FINE, 128, 256, 8, 8, 8, 8.7),
    "G8T8, folded TP8 EP8 ETP1": Row(FINE, 128, 256, 8, 8, 1),
    "G8T8, folded TP8 EP64 ETP1": Row(FINE, 128, 256, 8, 64, 1),
    **{
        f"8x22B, TP4 EP8, {world} GPUs, batch 1024": Row(EIGHT, world, 1024, 4, 8, 4, mfu)
        for world, mfu in ((128, 40.4), (256, 39.1), (512, 36.0), (1024, 36.2))
    },
    **{f"8x22B, folded TP4 EP8 ETP1, {w} GPUs, batch 1024": Row(EIGHT, w, 1024, 4, 8, 1) for w in (128, 1024)},
}


def folding() -> dict[str, dict[str, float]]:
    """Returns the predictions for each row."""
    found = {}
    for name, row in FOLDING.items():
        result = predicted(row.overrides(), H100)[1]
        found[name] = {**numbers(result), "mfu_percent": 100 * result.mfu}
    return found


# ---- the command ---------------------------------------------------------------------------------------------------

CONFIRMED = {  # simulated beside the closed form
    "Medium, 256, TED": (*MODELS["Medium"].sizes(), *SYSTEMS["TED"].layout(MODELS["Medium"], 256)),
    "Medium, 256, SSMB, rows": (*MODELS["Medium"].sizes(), *SYSTEMS["SSMB, rows"].layout(MODELS["Medium"], 256)),
    "Large, 256, SSMB, rows": (*MODELS["Large"].sizes(), *SYSTEMS["SSMB, rows"].layout(MODELS["Large"], 256)),
    "Large, 256, SSMB, rows, once a node": (
        *MODELS["Large"].sizes(),
        *SYSTEMS["SSMB, rows, once a node"].layout(MODELS["Large"], 256),
    ),
}


def main() -> None:
    """The command."""
    results = {
        "frontier": on_frontier(),
        "as_run": as_run(),
        "parameters": {name: parameters(name) for name in MODELS},
        "layer_gb": {"slots": layer_gb(), "rows": layer_gb(ROWS)},
        "folding": folding(),
        "reported": REPORTED,
    }
    simulations = simulate_all({name: Job(overrides, FRONTIER) for name, overrides in CONFIRMED.items()})
    results["confirmed"] = {
        name: {
            "simulated_s": simulation.step_seconds,
            "closed_form_s": predicted(CONFIRMED[name])[1].step_seconds,
            "simulated_gib": peak_gib(simulation),
            "closed_form_gib": predicted(CONFIRMED[name])[1].memory.total / GIB,
        }
        for name, simulation in simulations.items()
    }
    write_json(HERE / "results.json", results)
    draw(results, HERE / "frontier.png")
    console = Console(width=150)
    for shown in tables(results):
        console.print(shown)


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Returns the tables of predictions."""
    head = ("memory, GiB", "GB out", "GB in node", "step, s", "TFLOP/s")
    frontier = Table("model, GCDs", "system", *head, title="X-MoE")
    for case, systems in results["frontier"].items():
        for system, found in systems.items():
            frontier.add_row(case, system, *cells(found))
    run = Table("Medium on 256", *head, "X-MoE faster by")
    for system, found in results["as_run"].items():
        run.add_row(system, *cells(found), f"{found['step_s'] / results['as_run']['X-MoE']['step_s']:.2f}")
    folded = Table("row", "memory, GiB", "step, s", "MFU, %", "reported", title="parallel folding")
    for name, found in results["folding"].items():
        reported = FOLDING[name].reported
        mfu = f"{found['mfu_percent']:.1f}"
        folded.add_row(name, f"{found['memory_gib']:.1f}", f"{found['step_s']:.2f}", mfu, f"{reported or ''}")
    return [frontier, run, folded]


def cells(found: Mapping[str, float]) -> tuple[str, ...]:
    """Returns the numbers of a row."""
    return (
        f"{found['memory_gib']:.1f}",
        f"{found['between_nodes_gb']:.1f}",
        f"{found['in_node_gb']:.1f}",
        f"{found['step_s']:.2f}",
        f"{found['tflops']:.1f}",
    )


SHOWN = {"Medium, 256": "Medium, 256 GCDs", "Large, 256": "Large, 256 GCDs", "Super, 1024": "Super, 1,024 GCDs"}
COLOURS = (ORANGE, VERMILION, PURPLE, SKY, BLUE, GREEN, "black")
DRAWN = ("Tutel-like", "TED", "TED, rows", "folded, rows", "SSMB", "SSMB, rows", "SSMB, rows, once a node")


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draws memory and time of each system for the larger models."""
    figure, axes = canvas("Predicted on Frontier, every layout with as many processes per set of experts", 2, (10, 4.2))
    limit = FRONTIER.memory_bytes / GIB
    for each, key, what in ((axes[0], "memory_gib", "GiB at the peak"), (axes[1], "step_s", "seconds of a step")):
        for number, case in enumerate(SHOWN):
            for place, (system, colour) in enumerate(zip(DRAWN, COLOURS, strict=True)):
                found = results["frontier"][case][system]
                fits = found["memory_gib"] <= limit
                at = number + (place - 3) * 0.12
                face, hatch = (colour, None) if fits else ("white", "////")
                each.bar(at, found[key], 0.105, facecolor=face, edgecolor=colour, hatch=hatch)
        each.set(xticks=range(len(SHOWN)), xticklabels=SHOWN.values(), ylabel=what)
    axes[0].axhline(limit, color="#444444", linewidth=0.9, linestyle="--")
    axes[0].annotate("a GCD's memory", (-0.5, limit), ha="left", va="bottom", fontsize=8)
    patches = [Patch(color=colour, label=system) for system, colour in zip(DRAWN, COLOURS, strict=True)]
    patches.append(Patch(facecolor="white", edgecolor="#444444", hatch="////", label="does not fit"))
    figure.legend(handles=patches, loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
