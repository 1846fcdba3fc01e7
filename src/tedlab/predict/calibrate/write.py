"""Writes the measurements for the cost model (a cluster file) and for people (a table and a picture)."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table as Shown

from tedlab.comm.collectives import Operation
from tedlab.compare.charts import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
from tedlab.predict.calibrate.fit import Line, Series, Table, fit, largest_error, largest_ratio
from tedlab.predict.calibrate.measure import Group, Measured
from tedlab.predict.cluster import KernelRate, MeasuredRate, MeasuredSize, seconds_through
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
        "  dispatch:  # seconds per operation of a model too small to compute anything, whose passes take turns",
        f"    forward: {measured.dispatch.forward:.4g}  # a forward pass",
        f"    backward: {measured.dispatch.backward:.4g}  # a backward pass",
        f"    optimizer: {measured.dispatch.optimizer:.4g}  # gradients gathered and clipped, AdamW tile by tile",
        f"    views: {str(measured.dispatch.views).lower()}  # whether views are counted as operations",
        *(
            [f"    collective: {measured.dispatch.collective:.4g}  # the host's part of a launch, mean of four kinds"]
            if measured.dispatch.collective  # nothing where it was not measured
            else []
        ),
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
    if measured.kernels:
        lines.append("  tables:  # by size: tokens of a sample, rows of an expert, or bytes moved; FLOP/s or bytes/s")
    for table in measured.kernels:
        lines += _table_lines(table)
    if fits:
        lines.append("collectives:  # by the bytes that a rank sends, and the bytes/s of a size")
    for (op, kind), line in fits.items():
        series = measured.collectives[op, kind]
        lines += [
            f"  - op: {op}  # {series.how}{_left_out(len(series.amounts) - len(_rates(series)))}",
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
    of_collectives = (
        _between(_measured_rates(series), fit(series).latency) for series in measured.collectives.values()
    )
    return spread_of([*of_lines, *of_collectives, *(_between(_kernel_rates(table)) for table in measured.kernels)])


def _between(sizes: Sequence[MeasuredSize], latency: float = 0.0) -> float:
    """Returns the largest factor, 1 at least, between a size and what would be predicted for it without it."""
    ratios, ordered = [1.0], sorted(sizes, key=lambda measured: measured.size)
    for n, measured in list(enumerate(ordered))[1:-1]:
        others = _growing([*ordered[:n], *ordered[n + 1 :]])
        between = seconds_through(others, latency, measured.size)
        ratios += [between / measured.seconds, measured.seconds / between]
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
    number = len(series.amounts) - len(_rates(series))
    which = f"sizes that {widest.size} exchanged{_left_out(number)}"
    yield f"  all_to_all:  # bytes over the link at once, and bytes/s: {which}"
    yield from _rate_lines(series, share, " " * 4)


Size = TypeVar("Size", bound=MeasuredSize)


def _growing(sizes: Iterable[Size]) -> list[Size]:
    """Returns sizes by growing size and seconds.

    One that was no quicker than a larger one was disturbed, and is left out: noise lengthens times.
    """
    kept: list[Size] = []
    for measured in sorted(sizes, key=lambda measured: measured.size, reverse=True):
        if not kept or measured.seconds < kept[-1].seconds:
            kept.append(measured)
    return kept[::-1]


def _measured_rates(series: Series) -> list[MeasuredRate]:
    """Returns the sizes of a collective."""
    return [MeasuredRate(sent, sent / seconds) for sent, seconds in zip(series.amounts, series.seconds, strict=True)]


def _rates(series: Series, share: int = 1) -> list[MeasuredRate]:
    """Returns the sizes that a file has of a collective that ``share`` ranks send at the same time, as it says them."""
    every = _measured_rates(series)
    return _growing(MeasuredRate(float(f"{share * r.bytes:.6g}"), float(f"{share * r.bandwidth:.4g}")) for r in every)


def _kernel_rates(table: Table) -> list[KernelRate]:
    """Returns the sizes of a kernel as a file says them."""
    timings = zip(table.sizes, table.amounts, table.seconds, strict=True)
    return [KernelRate(float(f"{size:.6g}"), float(f"{amount / s:.4g}")) for size, amount, s in timings]


def _table_lines(table: Table) -> Iterator[str]:
    """Yields the lines of a kernel's table."""
    every = _kernel_rates(table)
    kept, off = _growing(every), _between(every) - 1
    residual = f"; a size is within {off:.0%} of what others say" if len(every) > 2 else ""
    yield f"    - kernel: {table.name}  # {table.how}{residual}{_left_out(len(every) - len(kept))}"
    if table.width is not None:
        yield f"      width: {table.width}  # of a head, or the narrower side of a matrix"
    if table.dtype is not None:
        yield f"      dtype: {table.dtype}  # others go by peak_flops"
    yield "      rates:"
    seconds = {rate.size: s for rate, s in zip(every, table.seconds, strict=True)}
    for rate in kept:
        yield f"        - {{size: {rate.size:.6g}, rate: {rate.rate:.4g}}}  # {seconds[rate.size] * 1e6:,.1f} µs a call"


def _left_out(number: int) -> str:
    """Returns what a comment adds where so many sizes are left out."""
    return f"; {number} slower than a larger one left out" if number else ""


def _rate_lines(series: Series, share: int, indent: str) -> Iterator[str]:
    """Yields a line for each of these rates."""
    for rate in _rates(series, share):
        values = f"bytes: {rate.bytes:.6g}, bandwidth: {rate.bandwidth:.4g}"
        yield f"{indent}- {{{values}}}  # {rate.seconds * 1e6:,.1f} µs"


def _how(series: Series, line: Line) -> str:
    worst = f", off by {largest_error(series, line):.0%} at most" if len(series.amounts) > 1 else ""
    return f"{series.how}{worst}"


def fit_table(measured: Measured, title: str) -> Shown:
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
    for kernel in measured.kernels:
        least, most = (end(rate.rate for rate in _kernel_rates(kernel)) / 1e9 for end in (min, max))
        unit = "GFLOP" if kernel.unit == "FLOP" else "GB"
        table.add_row(
            _named(kernel), "", f"{least:,.2f} to {most:,.2f} {unit}/s", f"{_between(_kernel_rates(kernel)) - 1:.0%}"
        )
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
    for phase in ("forward", "backward", "optimizer", "collective"):
        if taken := getattr(measured.dispatch, phase):
            table.add_row(f"the host, {phase}", f"{taken * 1e6:,.1f}", "", "")
    return table


def _named(table: Table) -> str:
    return table.name.replace("_", " ") + (f", {table.width}" if table.width else "")


class _Curve(NamedTuple):
    """What was measured of something, and what is predicted for other sizes.

    Attributes:
        name: Its name.
        sizes: What was measured.
        reached: FLOP/s or bytes/s of each size.
        predicted: Maps a size to those that are predicted.
    """

    name: str
    sizes: Sequence[float]
    reached: Sequence[float]
    predicted: Callable[[float], float]


def _of_line(name: str, series: Series) -> _Curve:
    line, reached = fit(series), [a / s for a, s in zip(series.amounts, series.seconds, strict=True)]
    return _Curve(name, series.amounts, reached, lambda amount: amount / line.seconds(amount))


def _of_collective(name: str, series: Series) -> _Curve:
    rates, latency = _rates(series), fit(series).latency
    return _of_line(name, series)._replace(predicted=lambda sent: sent / seconds_through(rates, latency, sent))


def _of_kernel(table: Table) -> _Curve:
    every = _kernel_rates(table)
    kept = _growing(every)
    reached = [rate.rate for rate in every]
    return _Curve(_named(table), table.sizes, reached, lambda size: size / seconds_through(kept, 0.0, size))


def picture(measured: Measured, path: Path) -> None:
    """Plots the measurements as marks, and as lines what is predicted between them."""
    by_group: dict[Group, list[_Curve]] = {}
    for (op, kind), series in measured.collectives.items():
        by_group.setdefault(kind, []).append(_of_collective(op.replace("_", "-"), series))
    products = [_of_line(*it) for it in (*measured.products.items(), ("attention", measured.attention))]
    memory = [_of_line("add, copy", measured.movement), _of_line("norm, softmax, GELU", measured.arithmetic)]
    kernels = {
        ("attention, grouped products", "tokens of a sample, rows of an expert", "GFLOP/s"): "FLOP",
        ("other kernels", "bytes of one operation", "GB/s"): "B",
    }
    panels = [
        ("matrix products and attention", "FLOP of one operation", "GFLOP/s", products),
        ("memory", "bytes of one operation", "GB/s", memory),
        *(
            (*said, curves)
            for said, unit in kernels.items()
            if (curves := [_of_kernel(table) for table in measured.kernels if table.unit == unit])
        ),
        *(
            (f"groups of {kind.size} on {kind.nodes} node(s)", "bytes of one operation", "GB/s", curves)
            for kind, curves in by_group.items()
        ),
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


def _panel(axes: Axes, title: str, size: str, unit: str, curves: Sequence[_Curve]) -> None:
    """Draws several curves."""
    for n, curve in enumerate(curves):
        colour, mark = _COLOURS[n % len(_COLOURS)], _MARKS[(n + n // len(_COLOURS)) % len(_MARKS)]
        axes.plot(curve.sizes, np.array(curve.reached) / 1e9, mark, color=colour, ms=5, label=curve.name)
        between = np.geomspace(min(curve.sizes), max(curve.sizes), 100)
        axes.plot(between, [curve.predicted(each) / 1e9 for each in between], color=colour, lw=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(size)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3, which="both", lw=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
