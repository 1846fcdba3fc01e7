"""Says for an assumed routing what each way to deal with it would cost: the layout stays, and the mixture changes.

The ways are experts with and without a capacity, experts that are lent (LLEP, or evenly), one row for each process or
node that a token goes to, and routers whose biases make all experts equally busy. Times are those of the closed form.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tedlab.config import LendPolicy, TrainConfig, with_values
from tedlab.console import output
from tedlab.errors import UsageError
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.estimate import estimate
from tedlab.predict.plan.lending import outcome
from tedlab.predict.sim.routing import SimulatedRouting
from tedlab.predict.spread import Spread, spread_on
from tedlab.tables import FittingTable
from tedlab.validate import check_simulated
from tedlab.validate.lending import minimum_filled_in

_GIB = 2**30
_PLAIN = {"moe.dispatch": "dropless", "moe.lend.policy": "none", "comm.dedup": "none"}
_CAPACITY = 1.25  # where the job has none


@dataclass(frozen=True)
class Choice:
    """What one way costs.

    Attributes:
        name: The way.
        settings: What makes it.
        step_seconds: Seconds of a step, in which every layer waits for its slowest process; None: it is not possible.
        peak_bytes: The memory of the fullest process.
        dropped: The share of choices that no expert takes.
        between_nodes_bytes: The bytes that the first process sends to other nodes in a step.
        why_not: Why it is not possible.
        assumed: Whether it is no setting but what training would have to reach first: equally busy experts.
    """

    name: str
    settings: Mapping[str, Any]
    step_seconds: float | None = None
    peak_bytes: int = 0
    dropped: float = 0.0
    between_nodes_bytes: float = 0.0
    why_not: str = ""
    assumed: bool = False


def choices(config: TrainConfig, cluster: ClusterConfig, shares_LE: np.ndarray) -> list[Choice]:
    """Predicts each way.

    Args:
        config: A configuration completed by :func:`tedlab.validate.complete_simulated`.
        cluster: The cluster that the job runs on.
        shares_LE: The proportions in which each MoE layer chooses its experts.
    """
    return [_choice(name, settings, config, cluster, shares_LE) for name, settings in _ways(config).items()]


def _ways(config: TrainConfig) -> dict[str, dict[str, Any]]:
    factor = config.moe.capacity_factor or _CAPACITY
    limited = {**_PLAIN, "moe.capacity_factor": factor}
    return {
        f"capacity {factor:g}": {**limited, "moe.dispatch": "capacity"},
        f"capacity {factor:g}, packed": {**limited, "moe.dispatch": "packed"},
        "dropless": _PLAIN,
        "dropless, LLEP": {**_PLAIN, "moe.lend.policy": LendPolicy.LLEP.value},
        "dropless, lent evenly": {**_PLAIN, "moe.lend.policy": LendPolicy.EVEN.value},
        "dropless, dedup by rank": {**_PLAIN, "comm.dedup": "rank"},
        "dropless, dedup by node": {**_PLAIN, "comm.dedup": "node"},
        "dropless, gathered": {**_PLAIN, "comm.dedup": "group"},
        "dropless, balanced by biases": _PLAIN,
    }


def _choice(
    name: str, settings: Mapping[str, Any], config: TrainConfig, cluster: ClusterConfig, shares_LE: np.ndarray
) -> Choice:
    job = with_values(config, settings)
    if settings.get("comm.dedup") == "node" and job.comm.ranks_per_node is None:
        job = with_values(job, {"comm.ranks_per_node": min(cluster.gpus_per_node, config.parallel.world_size)})
    balanced = name.endswith("biases")
    try:
        check_simulated(job)
        if job.moe.lend.policy != LendPolicy.NONE:
            job = with_values(job, {"moe.lend": minimum_filled_in(job, cluster)})
        if not job.moe.ragged:
            found = estimate(job, cluster)
            packed = SimulatedRouting(with_values(job, {"moe.dispatch": "packed"}), shares_LE)
            dropped, seconds, peak = packed.dropped, found.step_seconds, found.memory.total
        else:
            routing = SimulatedRouting(job, None if balanced else shares_LE)
            whole = outcome(job, cluster, routing)
            found = estimate(job, cluster, 0, routing.rows(0))
            dropped, seconds, peak = routing.dropped, whole.step_seconds, max(whole.peak_bytes)
    except (UsageError, ValueError) as error:
        return Choice(name, settings, why_not=" ".join(str(error).split()), assumed=balanced)
    return Choice(name, settings, seconds, peak, dropped, found.wire.get("between_nodes", 0.0), assumed=balanced)


def table(found: list[Choice], cluster: ClusterConfig) -> Table:
    """Returns a table of the ways, with the ranges of their times."""
    spread = spread_on(cluster)
    shown = FittingTable(title="what each way to deal with this routing would cost")
    shown.add_column("mixture")
    for heading in ("step, s", "range, s", "fullest, GiB", "dropped", "GB out"):
        shown.add_column(heading, justify="right")
    for choice in found:
        if choice.step_seconds is None:
            shown.add_row(choice.name, "", "", "", "", "")
            continue
        peak = f"{choice.peak_bytes / _GIB:.2f}" + ("" if choice.peak_bytes <= cluster.memory_bytes else " (too much)")
        shown.add_row(
            choice.name,
            f"{choice.step_seconds:.4g}",
            spread.ends(choice.step_seconds),
            peak,
            f"{choice.dropped:.1%}" if choice.dropped else "",
            f"{choice.between_nodes_bytes / 1e9:.2f}",
        )
    return shown


def verdict(found: list[Choice], cluster: ClusterConfig, spread: Spread) -> str:
    """Says which setting is the fastest that fits and drops nothing, which are as fast, and what is not possible."""
    said = [f"Not possible: {choice.name}: {choice.why_not}" for choice in found if choice.step_seconds is None]
    fitting = {
        choice.name: choice.step_seconds
        for choice in found
        if choice.step_seconds is not None and not choice.dropped and choice.peak_bytes <= cluster.memory_bytes
        if not choice.assumed
    }
    if all(choice.step_seconds is None for choice in found):
        return "\n".join(["No way can be estimated.", *said])
    said[:0] = [
        f"If training reaches it, {choice.name}: {spread.said(choice.step_seconds)}."
        for choice in found
        if choice.assumed and choice.step_seconds is not None
    ]
    if not fitting:
        return "\n".join(["No way fits that drops nothing.", *said])
    fastest = min(fitting, key=fitting.__getitem__)
    alike = [name for name, taken in fitting.items() if name != fastest and not spread.apart(taken, fitting[fastest])]
    first = f"The fastest that fits and drops nothing: {fastest}."
    if alike:
        first += f" Not told apart from it ({spread.factor:.2f} ×): {'; '.join(alike)}."
    return "\n".join([first, *said])


def show_choices(
    config: TrainConfig, cluster: ClusterConfig, routing: SimulatedRouting, console: Console | None = None
) -> None:
    """Prints the choices for a routing, and saves them as ``choices.json`` in ``output_dir``."""
    console = console or output()
    found = choices(config, cluster, routing.shares_LE)
    console.print(table(found, cluster))
    console.print(verdict(found, cluster, spread_on(cluster)))
    path = Path(config.output_dir) / "choices.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(choice) for choice in found], indent=1) + "\n")
