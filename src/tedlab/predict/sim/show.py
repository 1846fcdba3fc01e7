"""Shows a simulation as tables and pictures, and saves it as a run directory for ``tedlab compare``."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from rich.progress import TaskID
from rich.table import Table
from rich.text import Text

from tedlab.callbacks.ledger import traffic_table
from tedlab.comm import TRAINING_PHASES
from tedlab.comm.ledger import summed
from tedlab.config import TrainConfig
from tedlab.console import output
from tedlab.degrees import parallel_degrees
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.flops import training_flops
from tedlab.predict.sim.lanes import write_trace
from tedlab.predict.sim.meter import HIDDEN
from tedlab.predict.sim.pictures import causes, lanes_picture, memory_picture, time_picture
from tedlab.predict.sim.ranks import kinds_of_ranks
from tedlab.predict.sim.routing import SimulatedRouting
from tedlab.predict.sim.simulation import Simulation, simulate
from tedlab.predict.spread import Spread, spread_on
from tedlab.predict.volumes import tile_of
from tedlab.progress import CommandProgress
from tedlab.report import resolved_yaml
from tedlab.tables import FittingTable

_GIB = 2**30
Ranks = int | Literal["all", "stages"]


def simulate_visibly(
    config: TrainConfig,
    cluster_name: str,
    cluster: ClusterConfig,
    ranks: Ranks,
    routing: SimulatedRouting | None = None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs :func:`simulate` with a progress bar, prints tables and fills ``output_dir``.

    Args:
        config: A configuration completed by :func:`tedlab.validate.complete_simulated`.
        cluster_name: The name of ``cluster``.
        cluster: The cluster that times are predicted for.
        ranks: One rank; or "stages", one of each kind that differs; or "all", whose summary lists every rank.
        routing: What routers choose, if experts have no capacity.
        warnings: What makes the prediction doubtful; it is printed, and stays in the summary.

    Returns:
        The summary of the rank, or of the slowest one, as written to ``summary.json``.
    """
    degrees = parallel_degrees(config.parallel)
    alike = kinds_of_ranks(degrees, cluster, routing)
    kinds = {ranks: [ranks]} if isinstance(ranks, int) else alike
    simulations = _simulated(config, cluster, [*kinds], routing)
    rank, simulation = max(simulations.items(), key=lambda item: (len(item[1].differences), item[1].step_seconds))
    layout = f"rank {rank} of {degrees}, on {cluster_name}"
    directory = Path(config.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    summary = summarize(simulation, config, cluster)
    if ranks == "all":
        summary |= _by_rank(simulations, kinds, degrees.world_size)
    if warnings:
        summary["sim/warnings"] = list(warnings)
    ours = OmegaConf.to_yaml({"sim": {"cluster": cluster_name, "rank": ranks}})
    (directory / "config.yaml").write_text(resolved_yaml(config) + ours)
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    memory_picture(simulation, cluster, directory / "memory.png")
    time_picture(simulation, directory / "time.png")
    lanes_picture(simulation, directory / "timeline.png")
    write_trace(simulation.spans, directory / "timeline.json", rank)
    console = output()
    console.print(f"Simulated: {layout}. Times are predicted, none was measured.")
    for warning in warnings:
        console.print(f"Warning: {warning}")
    if not isinstance(ranks, int):
        console.print(_ranks_table(simulations, kinds))
    elif len(alike) > 1:
        console.print(
            f"Note: not all ranks lie alike on the nodes, or get as many tokens. A job waits for its slowest: see "
            f"sim.rank=stages, which simulates ranks {', '.join(map(str, alike))}."
        )
    if routing is not None and len(set(routing.rows_by_expert_rank().sum(0))) > 1:
        console.print(_busiest(routing, rank))
    title = f"communication of rank {rank}, per step"
    for table in (
        traffic_table(title, simulation.ledger, 1, True, simulation.differences),
        _time_table(simulation),
        *([_overlap_table(simulation)] if simulation.hidden else []),
        _memory_table(summary, cluster),
        _closing_table(config, summary, spread_on(cluster)),
    ):
        console.print(table)
    return summary


def _busiest(routing: SimulatedRouting, rank: int) -> str:
    rows, busiest = routing.rows_by_expert_rank().sum(0), routing.busiest_rank()
    here, most = (sum(rows.computed for rows in routing.rows(r).values()) for r in (rank, busiest))
    text = f"With this routing the experts of rank {busiest} compute the most rows of a micro-batch: {most:,} over all "
    text += f"layers, {most / rows.mean():.2f} × the mean"
    return f"{text}." if here == most else f"{text}; those of rank {rank} {here:,}."


def _simulated(
    config: TrainConfig, cluster: ClusterConfig, ranks: list[int], routing: SimulatedRouting | None
) -> dict[int, Simulation]:
    with CommandProgress(counted=False) as bar:
        task = bar.add_task("simulating", total=float(len(ranks)))
        simulations = {}
        for number, rank in enumerate(ranks):
            simulations[rank] = simulate(config, cluster, rank, functools.partial(_show, bar, task, number), routing)
        bar.update(task, completed=float(len(ranks)))
    return simulations


def _show(bar: CommandProgress, task: TaskID, done: int, share: float) -> None:
    bar.update(task, completed=done + share)


def _by_rank(simulations: dict[int, Simulation], kinds: dict[int, list[int]], world_size: int) -> dict[str, Any]:
    """Returns every rank's peak bytes and seconds per step, in order of rank."""
    of_kind = {rank: simulations[first] for first, ranks in kinds.items() for rank in ranks}
    in_order = [of_kind[rank] for rank in range(world_size)]
    return {
        "memory/peak_bytes_by_rank": [sum(simulation.memory.at_peak().values()) for simulation in in_order],
        "sim/step_time_s_by_rank": [simulation.step_seconds for simulation in in_order],
    }


def summarize(simulation: Simulation, config: TrainConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """Returns a summary of one step of one rank, with the flat keys of a run's summary and further ones in ``sim/``."""
    peak = simulation.memory.at_peak()
    step, world = simulation.step_seconds, config.parallel.world_size
    tokens = config.data.batch_size * config.model.sequence_length
    flops = tokens * training_flops(config.model, config.moe, config.optim.groups) / world
    return {
        **simulation.about,
        "optim/tile": tile_of(config),
        "steps": 1,
        "perf/step_time_s": step,
        "sim/step_time_s_range": list(spread_on(cluster).range(step)),
        "sim/step_time_s_range_from": spread_on(cluster).source,
        "perf/tokens_per_second": tokens / step,
        "perf/tflops": flops / step / 1e12,
        "perf/mfu": flops / step / cluster.peak(str(config.trainer["precision"])),
        "memory/peak_bytes": sum(peak.values()),
        "memory/peak_bytes_by_rank": [sum(peak.values())],
        **{f"memory/{category}_bytes": size for category, size in peak.items()},
        **{f"sim/memory_most/{c}_bytes": int(values.max()) for c, values in simulation.memory.held.items()},
        **{
            f"comm/{phase}/{kind}/{op}/{value}": getattr(count, value)
            for (phase, kind, op), count in summed(simulation.ledger, "phase", "kind", "op").items()
            for value in ("calls", "payload_bytes", "wire_bytes", "seconds")
        },
        **{f"comm/link/{link}/wire_bytes": size for link, size in simulation.wire.items()},
        "comm/steps": 1,
        "comm/predicted_difference_bytes": sum(
            abs(ours.payload_bytes - theirs.payload_bytes) for ours, theirs in simulation.differences.values()
        ),
        "comm/predicted_difference_calls": sum(
            abs(ours.calls - theirs.calls) for ours, theirs in simulation.differences.values()
        ),
        **{f"sim/flops/{phase}": done for phase, done in simulation.flops.items() if done},
        **{f"sim/hidden_seconds/{e.phase}/{e.kind}/{e.op}/{e.tag}": time for e, time in simulation.hidden.items()},
        **{f"sim/seconds/{phase}/{cause}": taken for (phase, cause), taken in simulation.seconds.items()},
        "output_dir": config.output_dir,
    }


def _ranks_table(simulations: dict[int, Simulation], kinds: dict[int, list[int]]) -> Table:
    table = FittingTable(title="ranks that differ")
    table.add_column("rank")
    for heading in ("ranks like it", "step, s", "sent between nodes, GiB", "peak memory, GiB"):
        table.add_column(heading, justify="right")
    slowest = max(simulation.step_seconds for simulation in simulations.values())
    for rank, simulation in simulations.items():
        table.add_row(
            f"{rank} (slowest)" if simulation.step_seconds == slowest else f"{rank}",
            f"{len(kinds[rank]) - 1:,}",
            f"{simulation.step_seconds:.4f}",
            f"{simulation.wire.get('between_nodes', 0.0) / _GIB:.3f}",
            f"{sum(simulation.memory.at_peak().values()) / _GIB:.3f}",
        )
    table.caption = "a job waits for its slowest rank; what follows is that one's"
    return table


def _time_table(simulation: Simulation) -> Table:
    table = FittingTable(title="predicted seconds of a step")
    table.add_column("cause")
    for heading in (*TRAINING_PHASES, "all", "%"):
        table.add_column(heading, justify="right")
    hidden = [HIDDEN] if simulation.hidden else []
    for cause in [*causes(simulation), *hidden]:
        values = [simulation.seconds.get((phase, cause), 0.0) for phase in TRAINING_PHASES]
        name = cause.replace(", ", " ").replace("in_node", "in node").replace("between_nodes", "between nodes")
        table.add_row(name, *_row(values, simulation.step_seconds))
    table.add_section()
    phases = [sum(t for (when, _), t in simulation.seconds.items() if when == phase) for phase in TRAINING_PHASES]
    table.add_row("all", *_row(phases, simulation.step_seconds))
    flops = [simulation.flops.get(phase, 0.0) / 1e12 for phase in TRAINING_PHASES]
    table.add_row("TFLOP", *(f"{t:,.2f}" if t else "" for t in flops), f"{sum(flops):,.2f}", "")
    return table


def _overlap_table(simulation: Simulation) -> Table:
    """Shows how much of the time of collectives that something may hide behind is hidden."""
    table = FittingTable(title="overlap, seconds of a step")
    table.add_column("collective")
    for heading in ("alone", "hidden", "exposed", "hidden, %"):
        table.add_column(heading, justify="right")
    overlapping = {entry._replace(phase="forward") for entry in simulation.hidden}
    totals = {"all": [0.0, 0.0]}
    for entry, count in simulation.ledger.items():
        if entry._replace(phase="forward") in overlapping or entry in simulation.hidden:
            for name in (f"{entry.op} {entry.tag} ({entry.phase})", "all"):
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += count.seconds
                total[1] += simulation.hidden.get(entry, 0.0)
    for name, (alone, hidden) in sorted(totals.items(), key=lambda item: item[0] == "all"):
        if name == "all":
            table.add_section()
        table.add_row(name, f"{alone:.4f}", f"{hidden:.4f}", f"{alone - hidden:.4f}", f"{hidden / alone:.0%}")
    return table


def _row(values: list[float], whole: float) -> list[str]:
    total = sum(values)
    return [*(f"{v:.4f}" if v else "" for v in values), f"{total:.4f}", f"{total / whole:.1%}"]


def _memory_table(summary: dict[str, Any], cluster: ClusterConfig) -> Table:
    table = FittingTable(title="memory, GiB")
    table.add_column("category")
    table.add_column("at the peak", justify="right")
    table.add_column("at most", justify="right")
    for name, most in summary.items():
        if name.startswith("sim/memory_most/"):
            key = name.removeprefix("sim/memory_most/")
            table.add_row(key.removesuffix("_bytes"), f"{summary[f'memory/{key}'] / _GIB:.3f}", f"{most / _GIB:.3f}")
    table.add_section()
    peak = summary["memory/peak_bytes"]
    table.add_row("all", f"{peak / _GIB:.3f}", "")
    has, over = f"a GPU's {cluster.memory_bytes / _GIB:.1f} GiB", (peak - cluster.memory_bytes) / _GIB
    fits = f"{peak / cluster.memory_bytes:.0%} of {has}"
    table.caption = fits if over <= 0 else Text(f"does not fit: {over:.1f} GiB more than {has}", "red")
    return table


def _closing_table(config: TrainConfig, summary: dict[str, Any], spread: Spread) -> Table:
    table = FittingTable(title="predicted", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("step", f"{spread.said(summary['perf/step_time_s'])}, by {spread.source}")
    speed = f"{summary['perf/tokens_per_second']:,.0f} tokens/s, {summary['perf/tflops']:.3g} TFLOP/s per GPU"
    table.add_row("throughput", f"{speed}, MFU {summary['perf/mfu']:.1%}")
    table.add_row("parameters", f"{summary['parameters/total']:,} total, {summary['parameters/active']:,} active")
    table.add_row("saved in", config.output_dir)
    table.add_row("", "summary.json, config.yaml, memory.png, time.png, timeline.png, timeline.json (a trace)")
    return table
