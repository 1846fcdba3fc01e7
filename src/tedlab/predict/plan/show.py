"""Shows a plan: a progress bar, tables, and the file that ``tedlab train +plan=`` takes."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from tedlab.config import AssumedRouting, Slicing, TrainConfig, with_values
from tedlab.console import output
from tedlab.nn import HEADS
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.plan.family import base_parameters, parameters
from tedlab.predict.plan.file import allowed
from tedlab.predict.plan.learn import Learned, learn
from tedlab.predict.plan.lending import show_lending
from tedlab.predict.plan.plan import Plan, largest_models, make_plan, overrides, worker_processes
from tedlab.predict.plan.search import CHOSEN, ORDER, Candidate
from tedlab.predict.sim.routing import routing_of
from tedlab.predict.spread import Spread, spread_on
from tedlab.progress import CommandProgress, advancing
from tedlab.tables import FittingTable
from tedlab.untrusted import flat
from tedlab.validate import complete_simulated

_GIB = 2**30
_ROWS = 10
_REASONS = 8


def plan_visibly(
    config: TrainConfig,
    cluster_name: str,
    cluster: ClusterConfig,
    *,
    reserve_gib: float,
    simulations: int,
    find_largest: bool,
    given: Sequence[str],
    assumed: AssumedRouting | None = None,
    warnings: Sequence[str] = (),
    spread: Spread | None = None,
) -> Plan:
    """Runs :func:`make_plan` with a progress bar, prints the result and writes the winner to a file.

    Args:
        config: The configuration as composed, not yet completed.
        cluster_name, cluster: The cluster that the job runs on.
        reserve_gib: The GiB of each GPU that are left for what is not modelled.
        simulations: How many candidates to simulate.
        find_largest: Whether to look for the largest base model first.
        given: The overrides of the command line; the search keeps what they set.
        assumed: What routers choose in the layout that is found, to say whether to lend experts; None: nothing is said.
        warnings: What makes predictions doubtful; it is printed, and stays in the file.
        spread: How far times may be off; None: as the cluster says.
    """
    spread = spread or spread_on(cluster)
    fixed = fixed_by(given)
    with CommandProgress() as bar, worker_processes() as workers:
        task = bar.add_task("planning")

        def progress(doing: str, done: int, of: int) -> None:
            bar.update(task, description=doing, completed=done, total=of)

        reserve = reserve_gib * _GIB
        if find_largest:
            models = largest_models(config, cluster, workers, reserve=reserve, fixed=fixed, progress=progress)
            config = max(models.values(), key=base_parameters)
        plan = make_plan(
            config, cluster, workers, reserve=reserve, simulations=simulations, fixed=fixed, progress=progress
        )
    console = output()
    world = config.parallel.world_size
    console.print(f"Planned: {world} GPUs of {cluster_name}. Times are predicted, none was measured.")
    for warning in warnings:
        console.print(f"Warning: {warning}")
    if find_largest:
        console.print(_models_table(models))
    usable = cluster.memory_bytes / _GIB - reserve_gib
    console.print(_candidates_table(plan, usable))
    console.print(_alike(plan, spread))
    console.print(_refused_table(plan, usable))
    path = Path(config.output_dir) / "plan.overrides"
    write_overrides(plan, config, cluster, given, find_largest, path, warnings)
    console.print(Text.assemble(("fastest", "bold"), f" {' '.join(overrides(plan.winner))}"))
    if plan.winner.folded:
        console.print(_gain(plan))
    if assumed is not None and assumed.routing not in (None, "balanced"):
        found = complete_simulated(with_values(config, plan.winner.settings), cluster)
        routing = routing_of(found, str(assumed.routing), assumed.zipf, assumed.trace)
        if routing is not None and found.parallel.expert > 1:
            show_lending(found, cluster, routing, console)
    apart = [shlex.quote(override) for override in given if not allowed(override)]
    console.print(" ".join([f"tedlab train +plan={path}", *apart]), soft_wrap=True)
    return plan


def learn_visibly(cluster: ClusterConfig, paths: Sequence[str]) -> Learned:
    """Runs :func:`learn`, prints the result and returns it."""
    with advancing("learning", 1.0) as advance:
        learned = learn(cluster, paths, advance)
    console = output()
    console.print(learned.table())
    console.print(learned.verdict())
    return learned


def fixed_by(given: Sequence[str]) -> list[str]:
    """Returns the settings that a search would choose but that overrides have set, directly or through their group."""
    keys = [override.partition("=")[0].lstrip("+") for override in given]
    return sorted(
        name
        for name in CHOSEN
        if name in keys or (name.partition(".")[0] in keys and name.startswith(("comm.", "parallel.")))
    )


def _gain(plan: Plan) -> str:
    """Says what folding gains."""
    winner, other = plan.winner, plan.unfolded
    what = f"It is folded: each expert is divided over {winner.settings['parallel.expert_tensor']} processes, dense "
    what += f"layers over {winner.settings['parallel.tensor']}. "
    if other is None:
        return f"{what}No layout fits that is not."
    return (
        f"{what}A step takes {winner.step_seconds:.4g} s, in the fastest layout that is not folded "
        f"{other.step_seconds:.4g} s ({other.step_seconds / winner.step_seconds:.2f} ×): {' '.join(overrides(other))}"
    )


def _alike(plan: Plan, spread: Spread) -> str:
    """Says how long a step may take, and how many layouts a prediction cannot tell from the fastest."""
    fastest = plan.winner.step_seconds
    text = f"A step of the fastest takes {spread.said(fastest)}, by {spread.source}."
    others = [candidate for candidate in _shown(plan) if candidate is not plan.winner]
    alike = [other for other in others if not spread.apart(fastest, other.step_seconds)]
    if not alike:
        return text
    return (
        f"{text} {len(alike)} of the {len(others)} others above cannot be told apart from it: they are predicted to be "
        f"slower by less than that ({spread.factor:.2f} ×). Measure some steps of them before a long run."
    )


def _shown(plan: Plan) -> list[Candidate]:
    """Returns the candidates of the table: those that were simulated, then others of the front."""
    known = [candidate.settings for candidate in plan.simulated]
    return [*plan.simulated, *(other for other in plan.front[:_ROWS] if other.settings not in known)]


def write_overrides(
    plan: Plan,
    config: TrainConfig,
    cluster: ClusterConfig,
    given: Sequence[str],
    largest: bool,
    path: Path,
    warnings: Sequence[str] = (),
) -> None:
    """Writes the overrides that make the winner, one a line, with those of ``given`` that such a file may contain."""
    chosen = overrides(plan.winner)
    if largest:
        sizes = {name: getattr(config.model, name) for name in ("layers", *HEADS, "ffn")}
        chosen = [f"model.{name}={size}" for name, size in sizes.items() if size is not None] + chosen
    world, per_node = config.parallel.world_size, cluster.gpus_per_node
    if world > per_node and world % per_node == 0:
        chosen += [f"trainer.devices={per_node}", f"trainer.num_nodes={world // per_node}"]
    keys = {override.partition("=")[0] for override in chosen}
    kept = [override for override in given if allowed(override) and override.partition("=")[0] not in keys]
    winner = plan.winner
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"# predicted: {spread_on(cluster).said(winner.step_seconds)} a step, {winner.peak_bytes / _GIB:.2f} GiB\n"
        + "".join(f"# warning: {flat(warning)}\n" for warning in warnings)
        + "".join(f"{override}\n" for override in [*kept, *chosen])
    )


def _models_table(models: Mapping[int, TrainConfig]) -> Table:
    table = FittingTable(title="largest base model that fits")
    for heading in ("tensor", "parameters", "layers", "hidden", "with experts"):
        table.add_column(heading, justify="right")
    best = max(models.values(), key=base_parameters)
    for tensor, config in models.items():
        table.add_row(
            f"{tensor}",
            f"{base_parameters(config) / 1e9:.2f} B",
            f"{config.model.layers}",
            f"{config.model.hidden}",
            f"{parameters(config) / 1e9:.1f} B",
            style="bold" if config is best else None,
        )
    table.caption = "the bold one is planned; parallel.tensor=… plans another"
    return table


def _candidates_table(plan: Plan, usable: float) -> Table:
    shown = _shown(plan)
    table = FittingTable(title="layouts that no other beats in everything")
    folded = any(candidate.folded for candidate in shown)
    for heading in ("tensor", "expert", *(("expert tensor",) if folded else ()), "batch"):
        table.add_column(heading, justify="right")
    for heading in ("recompute", "copies", "tile"):
        table.add_column(heading)
    for heading in ("step, s", "tokens/s", "MFU", "peak, GiB", "GB out"):
        table.add_column(heading, justify="right")
    for candidate in plan.simulated:
        table.add_row(*_row(candidate, folded), style="bold" if candidate is plan.winner else None)
    table.add_section()
    for candidate in shown[len(plan.simulated) :]:
        table.add_row(*_row(candidate, folded), style="dim")
    more = len(plan.front) - len(plan.front[:_ROWS])
    table.caption = (
        f"above the line simulated (the closed form was off by at most {_largest_error(plan):.1%}), below it by the "
        f"closed form{f', {more} more not shown' if more > 0 else ''}; a GPU has {usable:.2f} GiB without the reserve; "
        "batch: micro-batch; copies: how tensor ranks avoid them; GB out: sent by a GPU to other nodes in a step"
    )
    reordered = {c.settings[ORDER] for c in (*plan.simulated, *shown) if ORDER in c.settings}
    table.caption += "".join(f"; *: {ORDER}={order}" for order in reordered)
    return table


def _largest_error(plan: Plan) -> float:
    """Returns the largest relative error of the closed form's time and memory against the simulator's."""
    fitting = plan.found.fitting
    estimated = [next(c for c in fitting if c.settings == simulated.settings) for simulated in plan.simulated]
    return max(
        abs(ours / theirs - 1)
        for mine, simulated in zip(estimated, plan.simulated, strict=True)
        for ours, theirs in zip(mine.costs[:2], simulated.costs[:2], strict=True)
    )


def _row(candidate: Candidate, folded: bool) -> list[str]:
    """Returns a candidate's cells; ``folded``: whether there is a column of the expert_tensor degree."""
    s = candidate.settings
    cac = {False: "", True: " cac", "shard": " cac shard"}.get(s["comm.cac"], " cac list")
    dealt = s["comm.dtd"] or (candidate.folded and s["parallel.tensor"] > 1)
    duplicates = "sequence" if s["parallel.sequence"] else "dtd" if dealt else ""
    duplicates = "slice" if s.get("moe.slice") == Slicing.TOKENS else duplicates
    return [
        f"{s['parallel.tensor']}",
        f"{s['parallel.expert']}{'*' * (ORDER in s)}",
        *([f"{s.get('parallel.expert_tensor') or s['parallel.tensor']}"] if folded else []),
        f"{s['data.micro_batch_size']}",
        "" if s["model.recompute.granularity"] == "none" else f"block{cac}",
        duplicates + (" fused" if s["comm.fuse_reduce_scatter"] else ""),
        f"{s['optim.tile']}",
        f"{candidate.step_seconds:.4g}",
        f"{candidate.tokens_per_second:,.0f}",
        f"{candidate.mfu:.1%}",
        f"{candidate.peak_bytes / _GIB:.2f}",
        f"{candidate.between_nodes_bytes / 1e9:.2f}",
    ]


def _refused_table(plan: Plan, usable: float) -> Table:
    found = plan.found
    table = FittingTable(title="combinations", show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{len(found.fitting):,}", "fit")
    if found.nearest is not None:
        over = found.nearest.peak_bytes / _GIB - usable
        table.add_row(
            f"{found.too_large:,}",
            f"do not fit in memory; the nearest miss, by {over:.2f} GiB in the {found.nearest.fullest}: "
            + " ".join(overrides(found.nearest)),
        )
    if found.slower:
        table.add_row(f"{found.slower:,}", "folded layouts are slower than the fastest that is not")
    reasons = found.refused.most_common()
    for reason, count in reasons[:_REASONS]:
        table.add_row(f"{count:,}", reason)
    if reasons[_REASONS:]:
        table.add_row(f"{sum(count for _, count in reasons[_REASONS:]):,}", "for other reasons")
    return table
