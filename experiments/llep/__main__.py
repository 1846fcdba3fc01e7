"""``python -m experiments.llep``: see README.md."""

import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.llep.real import measured
from experiments.paper import canvas, configured, write_json
from tedlab.comm.rows import Rows, rows_of, spread
from tedlab.config import LendConfig, TrainConfig, with_values
from tedlab.moe import MoESpec
from tedlab.moe.lending import Plan, least_loaded, loans_of, policy_of, slots_of
from tedlab.predict.cluster import load_cluster
from tedlab.predict.cost import collective_seconds
from tedlab.predict.sim.roofline import seconds
from tedlab.predict.volumes import ClosedForm

HERE = Path(__file__).parent
GPUS, TOKENS = 8, 16384
PAPER = LendConfig("llep", threshold=1.3, alpha=1.0, minimum=1024)
ALONE = ("model.layers=1", "moe.every=1", "moe.first_dense=0", "moe.shared.experts=0", "data.micro_batch_size=1")
SHAPES = {  # a layer of each model, and the tokens of a GPU
    "gpt-oss-120b": ("model=gpt_oss_120b", "moe=gpt_oss", "model.sequence_length=32768"),
    "DeepSeek-V3": ("model=deepseek_v3", "moe=deepseek_v3", "moe.ffn=2048", f"model.sequence_length={TOKENS}"),
    "Kimi-K2": (
        *(
            "model=deepseek_v3",
            "moe=deepseek_v3",
            "moe.ffn=2048",
            f"model.sequence_length={TOKENS}",
            "moe.num_experts=384",
        ),
        *("moe.router.expert_groups=1", "moe.router.chosen_groups=1", "moe.router.group_score=max"),
    ),
}
SHARES = (0.3, 0.5, 0.8, 0.95)
HOT = (1, 4)  # experts, each on another GPU
REPORTED = {  # arXiv 2601.17111: how many times faster a layer's forward pass is, one hot expert, 8 H200
    "gpt-oss-120b": (2.41, 3.48, 5.26, 6.11),
    "DeepSeek-V3": (1.96, 2.77, 4.23, 5.13),
    "Kimi-K2": (1.48, 2.74, 4.09, 5.03),
}


def main() -> None:
    """The command."""
    results = {
        shape: {f"{hot} hot": [predicted(shape, hot, share) for share in SHARES] for hot in HOT} for shape in SHAPES
    }
    host = host_seconds_per_expert(results)
    for shape in SHAPES:
        for row in results[shape]["1 hot"]:
            row["speedup_of_their_host"] = theirs(shape, row, host)
    plans, real = {shape: planning_seconds(shape) for shape in SHAPES}, measured()
    found = {"predicted": results, "host_seconds_per_expert": host, "planning_seconds": plans, "measured": real}
    write_json(HERE / "results.json", found)
    draw(HERE / "plan.png")
    console = Console()
    console.print(table(results))
    console.print(found["planning_seconds"], real)


def job(shape: str, lend: LendConfig) -> TrainConfig:
    """A layer on eight GPUs, one data rank each."""
    layout = (f"parallel.world_size={GPUS}", "parallel.tensor=1", f"parallel.expert={GPUS}", f"data.batch_size={GPUS}")
    config = configured([*SHAPES[shape], *ALONE, *layout, "trainer=gpu", "trainer.precision=bf16-true"])
    return with_values(config, {"moe.lend": lend})


def forced(experts: int, rows: int, hot: int, share: float) -> np.ndarray:
    """The choices of one sender, (E,): ``share`` of them for the hot experts alike, the others alike for the rest.

    A token may choose an expert several times here, as it must where more than 1/top_k of all choices are one expert's.
    """
    shares = np.full(experts, (1 - share) / (experts - hot))
    shares[:: experts // GPUS][:hot] = share / hot
    return spread(list(shares), rows, rows)


def planned(config: TrainConfig, hot: int, share: float) -> tuple[Plan, list[Rows]]:
    """Who computes what, and the rows that each process moves."""
    moe, tokens = config.moe, config.model.sequence_length
    counts_sE = np.tile(forced(moe.num_experts, tokens * moe.top_k, hot, share), (GPUS, 1))
    load_E, lend = counts_sE.sum(0), moe.lend
    plan = Plan(load_E, GPUS)
    if lend.policy != "none":
        plan = least_loaded(
            load_E, GPUS, threshold=lend.threshold, alpha=lend.alpha, minimum=lend.minimum, keep_small=lend.keep_small
        )
    slots = slots_of(plan, counts_sE[None])
    moved = []
    for process in range(GPUS):
        rows = rows_of(slots.counts_isV[:, :, slots.of(process)], tokens * moe.top_k, 0)
        loans = int(bool(plan.loans))
        moved.append(replace(rows, lent=plan.lent(process), borrowed=plan.borrowed(process), exchanges=loans))
    return plan, moved


def predicted(shape: str, hot: int, share: float) -> dict[str, float]:
    """Forward seconds of the slowest process, and bytes that the fullest keeps for the backward pass."""
    found: dict[str, float] = {"share": share}
    for name, lend in (("home", LendConfig()), ("lent", PAPER)):
        config = job(shape, lend)
        plan, moved = planned(config, hot, share)
        costs = [cost(config, rank, rows) for rank, rows in enumerate(moved)]
        found |= {
            f"{name}/seconds": max(time for time, _ in costs),
            f"{name}/kept_bytes": max(kept for _, kept in costs),
            f"{name}/load": float(plan.loads_P.max() / plan.loads_P.mean()),
            f"{name}/loans": len(plan.loans),
        }
    return found | {"speedup": found["home/seconds"] / found["lent/seconds"]}


def cost(config: TrainConfig, rank: int, rows: Rows) -> tuple[float, int]:
    """Predicted seconds of a layer's forward pass in one process, and the bytes that it keeps."""
    cluster, form = load_cluster("dgx_h200"), ClosedForm(config, {0: rows})
    layer, batch = form.spec.blocks[0].feed_forward, form.at(0)
    assert isinstance(layer, MoESpec)
    calls = [call for call in form.block(0) if call.phase == "forward" and call.kind == "expert"]
    links = sum(collective_seconds(c.op, c.even_payload_bytes, range(GPUS), cluster) for c in calls)
    return sum(seconds(work, cluster) for work in layer.forward(batch)) + links, layer.saved(batch)


def theirs(shape: str, row: dict[str, float], host: float) -> float:
    """The speedup if planning on the host takes so many seconds for each expert, while the GPUs wait."""
    return row["home/seconds"] / (row["lent/seconds"] + host * experts_of(shape))


def host_seconds_per_expert(results: dict[str, Any]) -> float:
    """The time with which speedups are closest to those reported, by the squares of their logarithms' differences."""

    def distance(host: float) -> float:
        return sum(
            math.log(theirs(shape, row, host) / reported) ** 2
            for shape in SHAPES
            for row, reported in zip(results[shape]["1 hot"], REPORTED[shape], strict=True)
        )

    return min((n * 1e-6 for n in range(100)), key=distance)


def experts_of(shape: str) -> int:
    """The number of experts of a layer."""
    return job(shape, PAPER).moe.num_experts


def planning_seconds(shape: str) -> float:
    """The time that our planning takes a process on this machine's CPU: who computes what, and all that is sent."""
    moe = job(shape, PAPER).moe
    counts_isE = np.tile(forced(moe.num_experts, TOKENS * moe.top_k, 1, 0.8), (1, GPUS, 1))
    policy = policy_of(replace(PAPER, ranks_per_node=GPUS), range(GPUS))
    assert policy is not None
    taken = []
    for _ in range(50):
        begin = time.perf_counter()
        plan = policy(counts_isE.sum((0, 1)))
        slots_of(plan, counts_isE)
        loans_of(plan, 0)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def table(results: dict[str, Any]) -> Table:
    """Predicted beside reported."""
    names = ("layer", "hot experts", "share", "load, max/mean", "faster", "with their host", "reported", "kept, GiB")
    shown = Table(*names, "loans")
    for shape, by_hot in results.items():
        for hot, rows in by_hot.items():
            for row, reported in zip(rows, REPORTED[shape], strict=True):
                shown.add_row(
                    shape,
                    hot.removesuffix(" hot"),
                    f"{row['share']:.0%}",
                    f"{row['home/load']:.2f} → {row['lent/load']:.2f}",
                    f"{row['speedup']:.2f}",
                    f"{row['speedup_of_their_host']:.2f}" if hot == "1 hot" else "",
                    f"{reported:.2f}" if hot == "1 hot" else "",
                    f"{row['home/kept_bytes'] / 2**30:.2f} → {row['lent/kept_bytes'] / 2**30:.2f}",
                    f"{row['lent/loans']:.0f}",
                )
    return shown


def draw(path: Path) -> None:
    """The picture: who computes which rows of gpt-oss-120b, 80 % of whose choices are one expert's."""
    figure, (left, right) = canvas("Rows of each GPU, of which 80 % are for one expert (gpt-oss-120b, 8 GPUs)", 2)
    for axes, lend, title in ((left, LendConfig(), "at home"), (right, PAPER, "lent to the least loaded")):
        plan, _ = planned(job("gpt-oss-120b", lend), 1, 0.8)
        borrowed = np.zeros(GPUS)
        for loan in plan.loans:
            borrowed[loan.borrower] += loan.stop - loan.start
        gpus, own = np.arange(GPUS), plan.loads_P - borrowed
        axes.bar(gpus, own, color="#30638e", label="of its own experts")
        axes.bar(gpus, borrowed, bottom=own, color="#edae49", label="of borrowed experts")
        axes.axhline(plan.loads_P.mean(), color="#444444", linewidth=0.8, linestyle="--")
        axes.set(title=title, xlabel="GPU", ylabel="rows", ylim=(0, 900_000), xticks=gpus)
    right.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
