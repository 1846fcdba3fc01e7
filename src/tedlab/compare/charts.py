"""Draws the charts of a comparison: loss curves, bytes by operation and phase, and the breakdown of a step's time."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from tedlab.compare.comparison import Comparison, missing
from tedlab.compare.quantities import MIB, SENT, STEP_TIME, Quantity
from tedlab.compare.runs import Curve, Run
from tedlab.compare.seeds import band
from tedlab.compare.traffic import emulated_seconds_by_link, seconds_by_phase, sorted_ops, traffic, wire_total
from tedlab.config import ChartAxis

# Okabe and Ito's colours, which readers with any colour vision tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_OTHER = "computation and other"
_PARTS = {  # part of a step's time → colour
    "forward": BLUE,
    "recompute": ORANGE,
    "backward": GREEN,
    "optimizer": PURPLE,
    "emulated in node": SKY,
    "emulated between nodes": VERMILION,
    _OTHER: "#9aa0a6",
}
_BAR = 0.46  # height of a bar, in rows
_LONG = 2 * 3600  # seconds from which an axis has hours


@dataclass(frozen=True)
class Theme:
    """Colours of everything that is not data."""

    ink: str
    faint: str
    paper: str


LIGHT = Theme(ink="#1f2328", faint="#d8dee4", paper="#ffffff")
DARK = Theme(ink="#e6edf3", faint="#3d444d", paper="#161b22")


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: File name without suffix.
        caption: Explains how to read the chart and what it shows.
        light: PNG on a light background.
        dark: PNG on a dark background.
    """

    name: str
    caption: str
    light: bytes
    dark: bytes


def charts(comparison: Comparison) -> list[Chart]:
    """Draws the charts for which the runs have data."""
    drawn = []
    for name, caption, draw in (
        ("loss", _loss_caption(comparison), _losses),
        ("flips", _FLIPS_CAPTION, _flips),
        ("bytes", _BYTES_CAPTION, _bytes),
        ("step_time", _time_caption(comparison), _times),
    ):
        light, dark = (_png(draw, comparison, theme) for theme in (LIGHT, DARK))
        if light and dark:
            drawn.append(Chart(name, caption, light, dark))
    return drawn


_BYTES_CAPTION = "Colours are operations; the names above a bar are the phases of the step, gaps part them."


_FLIPS_CAPTION = "Lines are means over the MoE layers, bands reach from the layer with fewest to that with most flips."


def _loss_caption(comparison: Comparison) -> str:
    said = ["Lines are training losses, circles validation losses. Curves that coincide are drawn inside one another."]
    if comparison.view.smoothing:
        said.append(f"Lines are smoothed ({comparison.view.smoothing:g}); the losses themselves are faint behind them.")
    if any(run.members for run in comparison.runs):
        said.append("Where runs were averaged over seeds, the line is their mean; bands reach from lowest to highest.")
    if any(run.unfinished for run in comparison.runs):
        said.append("× marks where a run stands that has not finished.")
    return " ".join(said)


def _time_caption(comparison: Comparison) -> str:
    if not any(_communication(run) for run in comparison.runs):
        return "Collectives were not timed (comm.ledger.time=true does), so each bar is the time of a whole step."
    emulated = any(run.emulated for run in comparison.runs)
    hatched = " Hatched: emulated or simulated, not measured." if emulated else ""
    return f"Time in collectives; the rest of the step is {_OTHER}.{hatched}"


def _losses(comparison: Comparison, theme: Theme) -> Figure | None:
    view = comparison.view
    absent = missing(comparison.runs, view.x)
    runs = [run for run in comparison.runs if run not in absent]
    if not any(curve for run in runs for curve in run.curves.values()):
        return None
    count = len(comparison.runs)
    figure, axes = _canvas(4.6 + 0.12 * count, _loss_title(comparison))
    divisor, unit = _unit(runs, view.x)
    for index, run in enumerate(comparison.runs):
        if run in absent:
            continue

        def points(curve: Curve, run: Run = run) -> tuple[list[float], list[float]]:
            return [x / divisor for x in _axis(run, view.x, [step for step, _ in curve])], [loss for _, loss in curve]

        style = {"color": _COLOURS[index % len(_COLOURS)], "ls": _DASHES[index // len(_COLOURS) % len(_DASHES)]}
        covering = sum(_coincide(run, later) for later in comparison.runs[index + 1 :])
        width = 1.5 + 5.0 * covering / count
        train = run.curves["train/loss"]
        if view.smoothing:
            axes.plot(*points(train), lw=0.8, alpha=0.3, **style)
        line = smoothed(train, view.smoothing)
        axes.plot(*points(line), lw=width, label=comparison.label(run), **style)
        axes.plot(*points(run.curves["val/loss"]), lw=0.7, marker="o", ms=3 + 1.5 * width, mfc=theme.paper, **style)
        if run.members:
            lowest, highest = (points(smoothed(edge, view.smoothing)) for edge in band(run, "train/loss"))
            axes.fill_between(lowest[0], lowest[1], highest[1], color=style["color"], alpha=0.2, lw=0)
        if run.unfinished and line:
            axes.plot(*points(line[-1:]), marker="x", ms=9, mew=2.5, color=style["color"])
    axes.set_xlabel(unit)
    axes.set_ylabel("cross-entropy, nats per token")
    if view.x == ChartAxis.STEP:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color=theme.faint, lw=0.7)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=2 if max(map(len, labels)) < 45 else 1, frameon=False
    )
    return figure


def smoothed(curve: Curve, weight: float) -> Curve:
    """Returns the exponential moving average of a curve, as W&B and TensorBoard draw it.

    Each value keeps ``weight`` of the average before it. The first ones, which have little before them, are divided by
    the weight that there is. Values that are no numbers count neither for their neighbours nor for themselves.
    """
    average = total = 0.0
    smooth = []
    for step, loss in curve:
        if math.isfinite(loss):
            average = weight * average + (1 - weight) * loss
            total = weight * total + (1 - weight)
            loss = average / total
        smooth.append((step, loss))
    return smooth


def _axis(run: Run, x: str, steps: Sequence[int]) -> list[float]:
    """Returns where steps of a run lie on the axis; between and after those that were logged, at the rate around."""
    clock = {ChartAxis.TOKENS: run.tokens, ChartAxis.TIME: run.seconds}.get(ChartAxis(x))
    if clock is None or not steps:
        return [float(step) for step in steps]
    known = sorted({0: 0.0, **clock}.items())
    (before, less), (end, most) = known[-2:] if len(known) > 1 else 2 * known
    rate = (most - less) / (end - before) if end > before else 0.0
    values = np.interp(steps, [step for step, _ in known], [value for _, value in known])  # stays at the last one
    return [float(value) + rate * max(0, step - end) for value, step in zip(values, steps, strict=True)]


def _unit(runs: Sequence[Run], x: str) -> tuple[float, str]:
    """Returns by what to divide an axis, and its label."""
    if x != ChartAxis.TIME:
        return 1, {ChartAxis.STEP: "step", ChartAxis.TOKENS: "tokens read"}[ChartAxis(x)]
    divisor, unit = (3600, "h") if max(max(run.seconds.values(), default=0) for run in runs) > _LONG else (1, "s")
    return divisor, f"training without validation, {unit}{' †' * any(run.emulated for run in runs)}"


def _flips(comparison: Comparison, theme: Theme) -> Figure | None:
    if not comparison.flips:
        return None
    figure, axes = _canvas(3.6, f"Choices of experts that differ from those of run {comparison.runs[0].name}")
    for index, run in enumerate(comparison.runs):
        if run.name in comparison.flips:
            rates = comparison.flips[run.name]
            steps, percent_SL = list(rates), 100 * np.stack(list(rates.values()))
            colour = _COLOURS[index % len(_COLOURS)]
            axes.fill_between(steps, percent_SL.min(1), percent_SL.max(1), color=colour, alpha=0.2, lw=0)
            axes.plot(steps, percent_SL.mean(1), color=colour, label=comparison.label(run), marker="o", ms=3)
    axes.set_xlabel("step")
    axes.set_ylabel("flipped, %")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color=theme.faint, lw=0.7)
    figure.legend(loc="outside lower left", frameon=False)
    return figure


def _coincide(run: Run, other: Run) -> bool:
    """Tells whether the training losses of two runs look the same in the chart."""
    (steps, ours), (other_steps, theirs) = _xy(run.curves["train/loss"]), _xy(other.curves["train/loss"])
    return steps == other_steps and all(map(partial(math.isclose, rel_tol=1e-3), ours, theirs))


def _loss_title(comparison: Comparison) -> str:
    same = len(comparison.runs) > 1 and all(effect.loss_distance == 0.0 for effect in comparison.against_first())
    return "Loss curves: identical to the last digit" if same else "Loss curves"


def _bytes(comparison: Comparison, theme: Theme) -> Figure | None:
    totals = [wire_total(run) or 0.0 for run in comparison.runs]
    if not any(totals):
        return None
    figure, axes = _bars(comparison, theme, "Bytes sent by rank 0 in one training step", "MiB", max(totals) / MIB)
    ops = sorted_ops(t.op for run in comparison.runs for t in traffic(run) if t.wire_bytes)
    colours = {op: _COLOURS[index % len(_COLOURS)] for index, op in enumerate(ops)}
    for row, run in enumerate(comparison.runs):
        end = 0.0
        sending = [collective for collective in traffic(run) if collective.wire_bytes]
        for phase, collectives in groupby(sending, attrgetter("phase")):
            begin = end
            if begin:
                axes.vlines(end, row - _BAR / 2, row + _BAR / 2, color=theme.paper, lw=3, zorder=3)
            for op, same in groupby(collectives, attrgetter("op")):
                size = sum(collective.wire_bytes for collective in same) / MIB
                axes.barh(row, size, _BAR, left=end, color=colours[op])
                end += size
            if (end - begin) * MIB > 0.09 * max(totals):  # there is room for the word
                axes.text((begin + end) / 2, row - 0.3, phase, ha="center", va="bottom", size=8.5)
        _write_total(comparison, run, SENT, "MiB", end, row, axes)
    _legend(figure, {op.replace("_", "-"): colour for op, colour in colours.items()})
    return figure


def _times(comparison: Comparison, theme: Theme) -> Figure | None:
    parts = []
    for run in comparison.runs:
        communication = _communication(run)
        rest = (run.number("perf/step_time_s") or 0.0) - sum(communication.values())
        parts.append({**communication, _OTHER: max(0.0, rest)})
    longest = max(sum(part.values()) for part in parts)
    if not longest:
        return None
    clusters = sorted({run.emulated for run in comparison.runs if run.emulated})
    title = "Time of one training step" + (f" († with an emulated network: {', '.join(clusters)})" if clusters else "")
    figure, axes = _bars(comparison, theme, title, "ms", longest * 1e3)
    for row, (run, part) in enumerate(zip(comparison.runs, parts, strict=True)):
        end = 0.0
        for name, seconds in part.items():
            hatch = {"hatch": "///", "edgecolor": theme.paper, "lw": 0} if run.emulated and name != _OTHER else {}
            axes.barh(row, seconds * 1e3, _BAR, left=end, color=_PARTS[name], **hatch)
            end += seconds * 1e3
        _write_total(comparison, run, STEP_TIME, "ms†" if run.emulated else "ms", end, row, axes)
    used = {name for part in parts for name in part}
    _legend(figure, {name: colour for name, colour in _PARTS.items() if name in used and len(used) > 1})
    return figure


def _communication(run: Run) -> dict[str, float]:
    """Returns seconds per step in collectives: by phase if timed, else the emulated network's delays by link."""
    delays = {f"emulated {link}": delay for link, delay in emulated_seconds_by_link(run).items()}
    return seconds_by_phase(run) or delays


def _canvas(height: float, title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8.4, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    axes = figure.subplots()
    figure.suptitle(title, x=0.015, ha="left", weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bars(comparison: Comparison, theme: Theme, title: str, unit: str, longest: float) -> tuple[Figure, Any]:
    """Makes axes with a row for each run and room for totals beside the longest bar."""
    count = len(comparison.runs)
    figure, axes = _canvas(1.5 + 0.62 * count, title)
    axes.set_yticks(range(count), [fill(comparison.label(run), 32) for run in comparison.runs])
    axes.set_ylim(count - 0.5, -0.6)
    axes.set_xlim(0, longest * 1.3)
    axes.set_xlabel(unit)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.grid(axis="x", color=theme.faint, lw=0.7)
    return figure, axes


def _write_total(
    comparison: Comparison, run: Run, quantity: Quantity, unit: str, end: float, row: int, axes: Any
) -> None:
    value, ratio = quantity.value(run), comparison.ratio(run, quantity)
    text = "not recorded" if value is None else f"{quantity.show(value)} {unit}"
    text += "" if ratio is None else f"  ×{ratio:.2f}"
    axes.annotate(text, (end, row), (6, 0), textcoords="offset points", va="center", weight="bold")


def _legend(figure: Figure, colours: dict[str, str]) -> None:
    if colours:
        handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower left", ncols=min(5, len(handles)), frameon=False)


def _xy(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [loss for _, loss in curve]


def _png(draw: Callable[[Comparison, Theme], Figure | None], comparison: Comparison, theme: Theme) -> bytes | None:
    style: dict[Any, Any] = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), theme.ink),
        **dict.fromkeys(("axes.facecolor", "figure.facecolor"), theme.paper),
        "font.size": 10.5,
        "figure.titlesize": 12.5,
        "axes.axisbelow": True,  # draws grid lines behind bars
        "hatch.linewidth": 1.2,
        "text.parse_math": False,  # keeps a "$" in a setting literal
    }
    with matplotlib.rc_context(style):
        figure = draw(comparison, theme)
        if figure is None:
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
