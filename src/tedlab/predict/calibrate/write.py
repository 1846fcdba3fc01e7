"""Writes the measurements for the cost model (a cluster file) and for people (a table and a picture)."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from tedlab.comm.collectives import Operation
from tedlab.compare.charts import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
from tedlab.predict.calibrate.fit import Line, Series, fit, largest_error, largest_ratio
from tedlab.predict.calibrate.measure import Group, Measured
from tedlab.predict.cluster import MeasuredRate, seconds_through
from tedlab.predict.spread import spread_of
from tedlab.tables import FittingTable

_COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
_MARKS = "os^Dv*"


@dataclass(frozen=True)
class Facts:
    """The machine and the circumstances of a measurement.

    Attributes:
        processes: The number of processes.
        per_node: The number of processes on each node.
        threads: The number of threads of each process.
        device: The name of the device.
        memory_bytes: Bytes of memory for each process.
        asynchronous: Whether the host continues while kernels run.
        main: The dtype that models are trained in on this device.
        date: The date of the measurement.
    """

    processes: int
    per_node: int
    threads: int
    device: str
    memory_bytes: float
    asynchronous: bool
    main: str
    date: str


def cluster_yaml(measured: Measured, facts: Facts) -> str:
    """Returns the text of a cluster file, in which a comment on each figure says how it was measured."""
    products = {name: fit(series) for name, series in measured.products.items()}
    main, attention = products[facts.main], fit(measured.attention)
    movement, arithmetic = fit(measured.movement), fit(measured.arithmetic)
    fits = {key: fit(series) for key, series in measured.collectives.items()}
    inside = _widest(fits, nodes=1)
    outside = next((key for key in reversed(fits) if key[1].nodes > 1 and key[0] == "all_reduce"), None)
    lines = [
        f"# Measured by tedlab calibrate on {facts.date}: {facts.processes} processes of {facts.threads} threads,",
        f"# torch {torch.__version__}, {facts.device}. Figures are what is reached, so efficiencies are 1.",
        f"device: {json.dumps(facts.device)}  # what was measured",
        f"spread: {_spread(measured):.4g}  # two of three lines are nowhere further from what was measured",
        f"gpus_per_node: {facts.per_node}  # processes on a node, started for the measurement",
        f"memory_bytes: {facts.memory_bytes:.4g}  # "
        + ("of the GPU" if facts.asynchronous else "of the machine, divided by the processes"),
        f"memory_bandwidth: {movement.rate:.4g}  # {_how(measured.movement, movement)}",
        "peak_flops:",
        *(f"  {n}: {line.rate:.4g}  # {_how(measured.products[n], line)}" for n, line in products.items()),
        *_link("in_node", fits, inside, 1),
        *_exchanges(measured.collectives, 1, 1),
        *_link("between_nodes", fits, outside, facts.per_node),
        *_exchanges(measured.collectives, None, facts.per_node),
        "efficiency:",
        "  gemm: 1  # measured figures above",
        "  memory: 1  # measured figures above",
        "  in_node: 1  # measured figures above",
        "  between_nodes: 1  # measured figures above",
        "  all_to_all: 1  # measured figures above",
        f"  attention: {min(1.0, attention.rate / main.rate):.4g}  # {_how(measured.attention, attention)}",
        "kernels:",
        "  dispatch:  # seconds per operation of a model too small to compute anything",
        f"    forward: {measured.dispatch.forward:.4g}  # a forward pass",
        f"    backward: {measured.dispatch.backward:.4g}  # a backward pass",
        f"    optimizer: {measured.dispatch.optimizer:.4g}  # gradients gathered and clipped, AdamW tile by tile",
        f"  asynchronous: {str(facts.asynchronous).lower()}  # "
        + ("the host only launches kernels" if facts.asynchronous else "the host computes"),
        f"  gemm_latency: {main.latency:.4g}  # of the line through {facts.main}'s matrix products",
        f"  attention_latency: {attention.latency:.4g}  # of the line through attention",
        *(
            [
                f"  memory_latency: {movement.latency:.4g}  # of the line through adding and copying",
                f"  arithmetic_latency: {arithmetic.latency:.4g}  # of the line through GELU, softmax and layer norm",
            ]
            if facts.asynchronous  # elsewhere dispatch includes them
            else []
        ),
        f"  arithmetic_bandwidth: {arithmetic.rate:.4g}  # {_how(measured.arithmetic, arithmetic)}",
    ]
    if measured.fresh is not None:
        lines.append(f"  fresh_bandwidth: {measured.fresh:.4g}  # zeros of 64 MiB, mapped anew each time")
    if fits:
        lines.append("collectives:  # by the bytes that a rank sends, and the bytes/s of a size")
    for (op, kind), line in fits.items():
        series = measured.collectives[op, kind]
        lines += [
            f"  - op: {op}  # {series.how}{_left_out(series)}",
            f"    size: {kind.size}  # ranks",
            f"    nodes: {kind.nodes}  # that they are on",
            f"    latency: {line.latency:.4g}  # of the line through all sizes",
            "    rates:",
            *_rate_lines(series, 1, " " * 6),
        ]
    if fits:
        lines.append("waits:  # for the slowest of a group: latency + share of the seconds since the last collective")
    for kind, series in measured.waits.items():
        line = fit(series)
        values = f"size: {kind.size}, nodes: {kind.nodes}, latency: {line.latency:.4g}, share: {_share(line):.4g}"
        lines.append(f"  - {{{values}}}  # {_how(series, line)}")
    return "\n".join(lines) + "\n"


def _spread(measured: Measured) -> float:
    """Returns the factor within which two of three lines and tables are of all that was measured for them.

    A table goes through what was measured; each size but the first and the last counts as what the others say of it.
    """
    lines = *measured.products.values(), measured.attention, measured.movement, measured.arithmetic
    of_lines = [largest_ratio(series, fit(series)) for series in lines if len(series.amounts) > 1]
    return spread_of([*of_lines, *(_between(series) for series in measured.collectives.values())])


def _between(series: Series) -> float:
    """Returns the largest factor, 1 at least, between a size and what would be predicted for it without it."""
    ratios, sizes = [1.0], sorted(zip(series.amounts, series.seconds, strict=True))
    for n in range(1, len(sizes) - 1):
        amounts, seconds = zip(*sizes[:n], *sizes[n + 1 :], strict=True)
        (between,) = _through(replace(series, amounts=amounts, seconds=seconds), [sizes[n][0]])
        ratios += [between / sizes[n][1], sizes[n][1] / between]
    return max(ratios)


def _share(line: Line) -> float:
    """Returns the share by which waiting lengthens the time between collectives, from the line of a wait series."""
    return max(0.0, 1 / line.rate - 1)


Call = tuple[Operation, Group]


def _widest(fits: dict[Call, Line], nodes: int) -> Call | None:
    """Returns the key of the all-reduce over the most ranks on ``nodes`` nodes, or None."""
    keys = [key for key in fits if key[0] == "all_reduce" and key[1].nodes == nodes]
    return max(keys, key=lambda key: key[1].size, default=None)


def _link(name: str, fits: dict[Call, Line], key: Call | None, share: int) -> Iterator[str]:
    """Yields the lines of the link that makes a ring as fast as this all-reduce, for groups that were not measured."""
    if key is None:
        yield f"{name}: null  # no group of processes uses such a link"
        return
    _, kind = key
    steps = 2 * (kind.size - 1 if kind.nodes == 1 else kind.nodes - 1)
    source = f"from the all-reduce of {kind.size} on {kind.nodes} node{'s' if kind.nodes > 1 else ''}"
    yield f"{name}:"
    yield f"  bandwidth: {fits[key].rate * share:.4g}  # {source}"
    yield f"  latency: {max(fits[key].latency / steps, 1e-9):.4g}  # {source}, one of {steps} steps"


def _exchanges(collectives: dict[Call, Series], nodes: int | None, share: int) -> Iterator[str]:
    """Yields the lines of what all-to-alls of several sizes reach over a link, for groups that were not measured.

    They are those of the widest group whose bytes all take this link: inside one node, or with one rank on each.

    Args:
        collectives: What was measured.
        nodes: 1 for the link inside a node, None for that between nodes.
        share: How many ranks use the link at the same time.
    """
    kinds = [kind for op, kind in collectives if op == "all_to_all" and kind.nodes == (nodes or kind.size)]
    if not kinds:
        return
    widest = max(kinds, key=lambda kind: kind.size)
    series = collectives["all_to_all", widest]
    which = f"sizes that {widest.size} exchanged{_left_out(series)}"
    yield f"  all_to_all:  # bytes over the link at once, and bytes/s: {which}"
    yield from _rate_lines(series, share, " " * 4)


def _rates(series: Series, share: int = 1) -> list[MeasuredRate]:
    """Returns the sizes of a collective that ``share`` ranks send at the same time, by growing bytes and seconds.

    A message that was no quicker than a larger one was disturbed, and is left out: noise lengthens times. Both count as
    the file says them.
    """
    kept: list[MeasuredRate] = []
    for sent, seconds in sorted(zip(series.amounts, series.seconds, strict=True), reverse=True):
        rate = MeasuredRate(float(f"{share * sent:.6g}"), float(f"{share * sent / seconds:.4g}"))
        if not kept or rate.seconds < kept[-1].seconds:
            kept.append(rate)
    return kept[::-1]


def _left_out(series: Series) -> str:
    """Returns what a comment adds where sizes are left out."""
    number = len(series.amounts) - len(_rates(series))
    return f"; {number} slower than a larger one left out" if number else ""


def _rate_lines(series: Series, share: int, indent: str) -> Iterator[str]:
    """Yields a line for each of these rates."""
    for rate in _rates(series, share):
        values = f"bytes: {rate.bytes:.6g}, bandwidth: {rate.bandwidth:.4g}"
        yield f"{indent}- {{{values}}}  # {rate.seconds * 1e6:,.1f} µs"


def _through(series: Series, amounts: Iterable[float]) -> list[float]:
    """Returns the seconds that are predicted for a collective's sizes."""
    rates, latency = _rates(series), fit(series).latency
    return [seconds_through(rates, latency, amount) for amount in amounts]


def _how(series: Series, line: Line) -> str:
    worst = f", off by {largest_error(series, line):.0%} at most" if len(series.amounts) > 1 else ""
    return f"{series.how}{worst}"


def fit_table(measured: Measured, title: str) -> Table:
    """Returns a table of the latency, rate and worst error of every measurement."""
    table = FittingTable(title=title)
    table.add_column("measured")
    for heading in ("latency, µs", "rate", "worst error"):
        table.add_column(heading, justify="right")
    everything = [
        *((f"matrix products, {name}", series) for name, series in measured.products.items()),
        ("attention", measured.attention),
        ("moving bytes", measured.movement),
        ("norms, softmax, GELU", measured.arithmetic),
        *((f"{op} of {kind.size} on {kind.nodes}", series) for (op, kind), series in measured.collectives.items()),
    ]
    for name, series in everything:
        line = fit(series)
        rate = f"{line.rate / 1e9:,.2f} G{'FLOP' if series.unit == 'FLOP' else 'B'}/s"
        table.add_row(name, f"{line.latency * 1e6:,.1f}", rate, f"{largest_error(series, line):.0%}")
    for kind, series in measured.waits.items():
        line = fit(series)
        table.add_row(
            f"waiting for {kind.size} on {kind.nodes}",
            f"{line.latency * 1e6:,.1f}",
            f"{_share(line):.1%} of the time",
            f"{largest_error(series, line):.0%}",
        )
    if measured.fresh is not None:
        table.add_row("fresh memory", "", f"{measured.fresh / 1e9:,.2f} GB/s", "")
    for phase, seconds in asdict(measured.dispatch).items():
        table.add_row(f"an operation, {phase}", f"{seconds * 1e6:,.1f}", "", "")
    return table


def picture(measured: Measured, path: Path) -> None:
    """Plots the measurements as marks, and as lines what is predicted between them."""
    by_group: dict[Group, list[tuple[str, Series]]] = {}
    for (op, kind), series in measured.collectives.items():
        by_group.setdefault(kind, []).append((op.replace("_", "-"), series))
    panels = [
        ("matrix products and attention", [*measured.products.items(), ("attention", measured.attention)], False),
        ("memory", [("add, copy", measured.movement), ("norm, softmax, GELU", measured.arithmetic)], False),
        *((f"groups of {kind.size} on {kind.nodes} node(s)", series, True) for kind, series in by_group.items()),
    ]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), dpi=130, layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).flatten()
    for place, panel in zip(axes, panels, strict=False):
        _panel(place, *panel)
    for unused in axes[len(panels) :]:
        unused.set_visible(False)
    figure.savefig(path)


def _panel(axes: Axes, title: str, lines: list[tuple[str, Series]], through: bool) -> None:
    """Draws several series; ``through`` says that predictions go through measurements, of which some are left out."""
    for (name, series), colour, mark in zip(lines, _COLOURS, _MARKS, strict=False):
        amounts = np.array(series.amounts)
        axes.plot(amounts, amounts / series.seconds / 1e9, mark, color=colour, ms=5, label=name)
        between = np.geomspace(amounts.min(), amounts.max(), 100)
        line = fit(series)
        predicted = np.array(_through(series, between)) if through else line.latency + between / line.rate
        axes.plot(between, between / predicted / 1e9, color=colour, lw=1)
    unit = lines[0][1].unit
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("FLOP of one operation" if unit == "FLOP" else "bytes of one operation")
    axes.set_ylabel("GFLOP/s" if unit == "FLOP" else "GB/s")
    axes.grid(alpha=0.3, which="both", lw=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
