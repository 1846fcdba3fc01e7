"""``python -m experiments.scmoe.predict``: predicted steps of ScMoE's models on their clusters, see README.md."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments.paper import composed, write_json
from tedlab.config import TrainConfig
from tedlab.models.shortcut import ShortcutSpec
from tedlab.predict.cluster import ClusterConfig, Efficiency, Link, PeakFlops, load_cluster
from tedlab.predict.cost import collective_seconds
from tedlab.predict.estimate import estimate
from tedlab.predict.estimate.hiding import BACK, THERE, Hiding
from tedlab.predict.sim.roofline import seconds
from tedlab.predict.volumes import ClosedForm
from tedlab.validate import complete_simulated

HERE = Path(__file__).parent


def a800() -> ClusterConfig:
    """One node of eight A800: an A100 whose NVLink has 400 GB/s in both directions (NVIDIA A800 data sheet)."""
    cluster = load_cluster("dgx_a100")
    assert cluster.in_node is not None
    return replace(cluster, in_node=replace(cluster.in_node, bandwidth=200e9), between_nodes=None)


def a30() -> ClusterConfig:
    """One node of eight A30 on PCIe 4.0 x16 (NVIDIA A30 data sheet); shares of peaks are assumed."""
    return ClusterConfig(
        gpus_per_node=8,
        memory_bytes=25e9,
        memory_bandwidth=933e9,
        peak_flops=PeakFlops(fp64=10.3e12, fp32=10.3e12, fp16=165e12, bf16=165e12),
        in_node=Link(bandwidth=32e9, latency=5.7e-6),
        between_nodes=None,
        efficiency=Efficiency(gemm=0.7, memory=0.85, in_node=0.35, between_nodes=0.9, all_to_all=0.6),
    )


CLUSTERS = {"8 × A800, NVLink": a800(), "8 × A30, PCIe": a30()}
ASSUMED = (  # what the paper's text that we have does not say
    *("parallel.world_size=8", "parallel.tensor=1", "parallel.expert=8", "trainer.precision=16-true", "moe.every=2"),
    *("data.batch_size=64", "data.micro_batch_size=8", "moe.capacity_factor=2", "model.sequence_length=1024"),
)
MODELS = {
    "GPT2-MoE-Medium": ("model.layers=24", "model.hidden=1024", "model.heads=16", "model.ffn=4096", "num_experts=16"),
    "GPT3-MoE-XL": ("model.layers=24", "model.hidden=2048", "model.heads=16", "model.ffn=8192", "num_experts=8"),
}
BESIDE = ("moe=top1", "moe.shared.experts=1", "moe.shared.combine=cg1")
VARIANTS = {
    "top-2": ("moe=top2",),
    "shared expert": BESIDE,
    **{p: (*BESIDE, f"moe.shortcut={p}", "comm.overlap_shortcut=true") for p in ("pos1", "pos2", "pos3")},
}
REPORTED = {  # of a training step, over top-2, on A800 with NVLink (seeds: arXiv 2404.05019v3)
    "GPT2-MoE-Medium": 1.12,
    "GPT3-MoE-XL": 1.12,
}


def main() -> None:
    """The command."""
    results: dict[str, Any] = {}
    shown = Table(
        "cluster", "model", "variant", "step, s", "exchanges, s", "hidden", "over top-2", "slot by FLOPs / time"
    )
    for cluster_name, cluster in CLUSTERS.items():
        for model, sizes in MODELS.items():
            of_model = tuple(size.replace("num_experts", "moe.num_experts") for size in sizes)
            found = {name: predicted((*of_model, *own), cluster) for name, own in VARIANTS.items()}
            results[f"{model}, {cluster_name}"] = found
            for name, its in found.items():
                ratio = found["top-2"]["step_s"] / its["step_s"]
                its["over_top2"] = ratio
                slots = "" if "slots" not in its else "{} / {}".format(*its["slots"])
                cells = f"{its['step_s']:.3f}", f"{its['exchange_s']:.3f}", f"{its['hidden_s'] / its['exchange_s']:.0%}"
                shown.add_row(cluster_name, model, name, *cells, f"{ratio:.2f}", slots)
    draw(CLUSTERS["8 × A30, PCIe"], HERE.parents[1] / "docs" / "scmoe.png")
    write_json(HERE / "predicted.json", {"predicted": results, "reported_over_top2": REPORTED})
    Console(width=140).print(shown)


def predicted(overrides: tuple[str, ...], cluster: ClusterConfig) -> dict[str, Any]:
    """Returns the seconds of a step, of its exchanges, and of what hides of them."""
    config = complete_simulated(composed((*ASSUMED, *overrides)))
    step = estimate(config, cluster)
    exchanged = sum(taken for cause, taken in step.seconds.items() if cause.startswith("all_to_all"))
    found: dict[str, Any] = {"step_s": step.step_seconds, "exchange_s": exchanged}
    form = ClosedForm(config)
    hidden = Hiding(form, cluster)
    blocks = [block for block, unit in enumerate(form.spec.units) if hidden.seconds(block)]
    times = config.trainer["accumulate_grad_batches"]
    found["hidden_s"] = times * sum(map(hidden.seconds, blocks))
    if blocks:
        unit: Any = form.spec.units[blocks[0]]
        slot = unit.slot(config.comm, config.model.sequence_length) - len(unit.sublayers) + unit.beside
        found["slots"] = [slot, hidden.best_slot()]
    return found


Bar = tuple[str, float, float, str]  # lane, start, seconds, what


def draw(cluster: ClusterConfig, file: Path) -> None:
    """Draws the forward pass of one pair of blocks of the smaller model, without a shortcut and with each."""
    names = {"none": "shared expert", **{p: p for p in ("pos1", "pos2", "pos3")}}
    figure = Figure(figsize=(8, 5), layout="constrained")
    rows = figure.subplots(len(names), sharex=True)
    for axes, (position, name) in zip(rows, names.items(), strict=True):
        overrides = (f"moe.shortcut={position}", *(("comm.overlap_shortcut=true",) if position != "none" else ()))
        model = tuple(size.replace("num_experts", "moe.num_experts") for size in MODELS["GPT2-MoE-Medium"])
        config = complete_simulated(composed((*ASSUMED, *model, *BESIDE, *overrides)))
        axes.barh(["compute", "links"], [0, 0])  # in this order
        for lane, start, taken, what in bars(config, cluster):
            color = {"links": "tab:orange", "compute": "tab:blue"}[lane] if what != "experts" else "tab:green"
            axes.barh(lane, taken * 1e3, left=start * 1e3, color=color, edgecolor="white")
            if taken > 2e-4:
                size = 7 if taken > 1e-3 else 5.5
                axes.text((start + taken / 2) * 1e3, lane, what, ha="center", va="center", fontsize=size, color="white")
        axes.set_title(name, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1].set_xlabel("predicted ms of a pair's forward pass, GPT2-MoE-Medium on eight A30")
    figure.savefig(file, dpi=150)


def bars(config: TrainConfig, cluster: ClusterConfig) -> list[Bar]:
    """Returns what runs when in the forward pass of the last pair."""
    form = ClosedForm(config)
    block = len(form.spec.blocks) - 1
    pair = ShortcutSpec(tuple(form.spec.blocks[block - 1 :]), 4)  # whose sub-layers are those of any wiring
    batch = form.at(block)
    calls = [call for call in form.block(block) if call.phase == "forward"]
    members = form.degrees.groups(0)
    dispatch, combine = (
        sum(collective_seconds(c.op, c.payload_bytes, members[c.kind], cluster) for c in calls if c.tag in tags)
        for tags in (THERE, BACK)
    )
    names = ("attention", "dense", "attention", "shared")
    layers = [
        (name, sum(seconds(work, cluster) for part in parts for work in part.forward(batch)))
        for name, parts in zip(names, pair.sublayers, strict=True)
    ]
    experts = sum(seconds(work, cluster) for work in pair.experts.routed_alone.forward(batch))
    unit = form.spec.units[block]
    first = slot = len(layers) - 1
    if isinstance(unit, ShortcutSpec):
        offset = len(layers) - len(unit.sublayers)
        first, slot = len(layers) - unit.beside, offset + unit.slot(config.comm, config.model.sequence_length)
    found: list[Bar] = []
    now = arrived = returned = 0.0
    for number, (name, taken) in enumerate([*layers, ("", 0.0)]):
        if number == first:
            found.append(("links", now, dispatch, "dispatch"))
            arrived = now + dispatch
        if number == slot:
            now = max(now, arrived)
            found += [("compute", now, experts, "experts"), ("links", now + experts, combine, "combine")]
            now, returned = now + experts, now + experts + combine
            if not isinstance(unit, ShortcutSpec):
                now = returned
        found.append(("compute", now, taken, name))
        now += taken
    return found


if __name__ == "__main__":
    main()
