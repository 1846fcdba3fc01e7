"""Says for an assumed routing whether to lend experts, and where: every rank's load, memory and time, with and without.

Times are those of the closed form. In each layer all processes wait for the slowest, so a layer takes as long as that.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tedlab.config import LendConfig, LendPolicy, TrainConfig, with_values
from tedlab.console import output
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.estimate.hiding import Hiding
from tedlab.predict.estimate.step import block_seconds, estimate
from tedlab.predict.sim.routing import SimulatedRouting
from tedlab.predict.volumes import ClosedForm
from tedlab.tables import FittingTable
from tedlab.validate.lending import minimum_filled_in

_GIB = 2**30
_MOST_RANKS = 32  # a longer table has the busiest and the idlest


@dataclass(frozen=True)
class Outcome:
    """What one expert group does in a micro-batch, by process of that group and MoE layer.

    Attributes:
        rows: Rows that each process computes: a list of processes for each layer.
        seconds: Seconds of each layer's block in each process, forward and backward, less what hides.
        loans: How many experts each layer lends.
        lent, borrowed: How many each process lends and borrows, over all layers.
        peak_bytes: The most memory that each process needs.
        step_seconds: Seconds of a step, in which each layer waits for the slowest process.
    """

    rows: list[list[int]]
    seconds: list[list[float]]
    loans: list[int]
    lent: list[int]
    borrowed: list[int]
    peak_bytes: list[int]
    step_seconds: float


@dataclass(frozen=True)
class Comparison:
    """The outcome without lending, and with it.

    Attributes:
        lend: How experts are lent, with numbers in place of ``auto``.
        blocks: The blocks with experts.
        ranks: The first tensor rank of each process of the first expert group.
        without, lending: The outcomes.
    """

    lend: LendConfig
    blocks: list[int]
    ranks: list[int]
    without: Outcome
    lending: Outcome

    @property
    def pays(self) -> bool:
        """Whether a step with lending is faster."""
        return self.lending.step_seconds < self.without.step_seconds

    def verdict(self) -> str:
        """Says in a sentence or two whether to lend, and where."""
        if not any(self.lending.loans):
            return f"Do not lend: with this routing no loan is worth it{self._least()}."
        where = [block for block, loans in zip(self.blocks, self.lending.loans, strict=True) if loans]
        before, after = self.without.step_seconds, self.lending.step_seconds
        change = f"a step takes {after:.4g} s instead of {before:.4g} ({before / after:.2f} ×)"
        worst = f"the fullest rank needs {max(self.lending.peak_bytes) / _GIB:.2f} GiB instead of "
        worst += f"{max(self.without.peak_bytes) / _GIB:.2f}"
        lending = f"moe.lend.policy={self.lend.policy} lends {sum(self.lending.loans)} experts in blocks "
        lending += f"{', '.join(map(str, where))}{self._least()}"
        if self.pays:
            return f"Lend: {lending}; {change}, and {worst}."
        return f"Do not lend for time: {lending}; {change}, but {worst}."

    def _least(self) -> str:
        if self.lend.policy != LendPolicy.LLEP:
            return ""
        inside, between = self.lend.minimum
        return f" (from {inside:,} rows on inside a node, {between:,} between nodes)"

    def table(self) -> Table:
        """Returns a table of every rank's load, memory and time."""
        table = FittingTable(title="experts at home → lent, by rank")
        table.add_column("rank", justify="right")
        headings = ("rows, most over mean", "lends", "borrows", "peak memory, GiB", "s in a step's layers")
        for heading in headings:
            table.add_column(heading, justify="right")
        busiest, after = (
            (np.array(o.rows) / np.maximum(np.mean(o.rows, 1, keepdims=True), 1)).max(0)
            for o in (self.without, self.lending)
        )
        shown = range(len(self.ranks))
        if len(shown) > _MOST_RANKS:
            order = np.argsort(-busiest, kind="stable").tolist()
            shown = sorted(order[: _MOST_RANKS // 2] + order[-_MOST_RANKS // 2 :])  # type: ignore[assignment]
            table.caption = f"the {_MOST_RANKS // 2} busiest ranks and as many of the idlest; lending.json has all"
        for p in shown:
            seconds = [sum(layer[p] for layer in o.seconds) for o in (self.without, self.lending)]
            peaks = [o.peak_bytes[p] / _GIB for o in (self.without, self.lending)]
            table.add_row(
                f"{self.ranks[p]}",
                f"{busiest[p]:.2f} → {after[p]:.2f}",
                f"{self.lending.lent[p]}",
                f"{self.lending.borrowed[p]}",
                f"{peaks[0]:.2f} → {peaks[1]:.2f}",
                f"{seconds[0]:.4f} → {seconds[1]:.4f}",
            )
        return table

    def save(self, directory: Path) -> None:
        """Writes everything to ``lending.json``."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "lending.json").write_text(json.dumps({**asdict(self), "pays": self.pays}, indent=1) + "\n")


def compare_lending(config: TrainConfig, cluster: ClusterConfig, routing: SimulatedRouting) -> Comparison:
    """Compares a job without lending and with it, by its own policy or, if that is none, LLEP's.

    Args:
        config: A configuration completed by :func:`tedlab.validate.complete_simulated`, whose experts have no capacity
            and are on several processes.
        cluster: The cluster that the job runs on.
        routing: What routers choose.

    Raises:
        ValueError: With ``comm.dedup``, which excludes lending, and as :func:`tedlab.predict.estimate.estimate`.
    """
    if routing.pilots:
        raise ValueError(f"comm.dedup={config.comm.dedup} excludes it; ask with comm.dedup=none")
    given = config.moe.lend
    if given.policy == LendPolicy.NONE:
        given = replace(given, policy=LendPolicy.LLEP.value)
    asked = with_values(config, {"moe.lend": given})
    lend = minimum_filled_in(asked, cluster)
    return Comparison(
        lend,
        list(routing.blocks),
        list(routing.degrees.groups(0)["expert"]),
        *(outcome(with_values(config, {"moe.lend": how}), cluster, routing) for how in (LendConfig(), lend)),
    )


def show_lending(
    config: TrainConfig, cluster: ClusterConfig, routing: SimulatedRouting, console: Console | None = None
) -> None:
    """Prints :func:`compare_lending` and saves it in ``output_dir``, or says why it cannot be computed."""
    console = console or output()
    try:
        comparison = compare_lending(config, cluster, routing)
    except ValueError as error:
        console.print(f"Whether to lend experts is not said: {error}")
        return
    console.print(comparison.table())
    console.print(comparison.verdict())
    comparison.save(Path(config.output_dir))


def outcome(config: TrainConfig, cluster: ClusterConfig, routing: SimulatedRouting) -> Outcome:
    """Predicts what every process of the first expert group does with a routing, with experts lent as configured."""
    routing = routing.lending(config.moe.lend)
    degrees, accumulated = routing.degrees, int(config.trainer["accumulate_grad_batches"])
    layers = routing.layers()
    seconds, peaks, known = [], [], {}
    for rank, kind in zip(degrees.groups(0)["expert"], routing.kinds_by_expert_rank(), strict=True):
        if kind not in known:  # ranks that compute and exchange the same take as long
            rows = routing.rows(rank)
            form = ClosedForm(config, rows)
            peak = estimate(config, cluster, rank, rows).memory.total
            hiding = Hiding(form, cluster, rank)
            taken = (block_seconds(form, n, cluster, rank) - hiding.seconds(n) for n in routing.blocks)
            known[kind] = [once * accumulated for once in taken], peak
        seconds.append(known[kind][0])
        peaks.append(known[kind][1])
    by_layer = [list(of_layer) for of_layer in zip(*seconds, strict=True)]
    whole = estimate(config, cluster, 0, routing.rows(0)).step_seconds
    return Outcome(
        rows=routing.rows_by_expert_rank().tolist(),
        seconds=by_layer,
        loans=[len(layer.plan.loans) for layer in layers],
        lent=[sum(layer.plan.lent(p) for layer in layers) for p in range(degrees.expert)],
        borrowed=[sum(layer.plan.borrowed(p) for layer in layers) for p in range(degrees.expert)],
        peak_bytes=peaks,
        step_seconds=whole + sum(max(layer) - layer[0] for layer in by_layer),
    )
