"""Builds the tables of a comparison as text, one row for each run; terminal and report show the same tables."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tedlab.compare.comparison import Comparison, Effect
from tedlab.compare.quantities import (
    FURTHER,
    PEAK,
    RESULTS,
    SENT,
    STEP_TIME,
    Quantity,
    evaluated,
    mib,
    milliseconds,
    telling,
)
from tedlab.compare.runs import CURVES, Run
from tedlab.compare.seeds import deviation
from tedlab.compare.traffic import (
    LINKS,
    PHASES,
    emulated_seconds_by_link,
    seconds_by_phase,
    sorted_ops,
    traffic,
    wire_by,
    wire_by_link,
)

_LEAST = 1024  # bytes per step, mean over runs: a few scalars deserve no column of a breakdown


class Cell(NamedTuple):
    """One cell of a table: a value, and its ratio to the first run or, of a mean, its deviation, if there is one."""

    text: str
    ratio: str = ""


@dataclass(frozen=True)
class Column:
    """A heading, which may have two lines, and a cell for each run."""

    heading: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Sheet:
    """A table with a row for each run of a comparison, without the columns that identify the run."""

    title: str
    columns: Sequence[Column]
    numeric: bool = True


def settings(comparison: Comparison) -> Sheet:
    """Makes the table of the settings that are compared."""
    columns = [_column(comparison, key, _setting(comparison, key)) for key in comparison.settings]
    return Sheet("Settings", columns, numeric=False)


def results(comparison: Comparison) -> Sheet:
    """Makes the table of final losses, speed, bytes and memory."""
    losses = []
    for name in CURVES:
        texts = telling([run.number(name) for run in comparison.runs])
        around = [deviation(run, name) for run in comparison.runs]
        cells = [Cell(text, "" if by is None else f"±{by:.1g}") for text, by in zip(texts, around, strict=True)]
        losses.append(Column(name.replace("/", "\n"), cells))
    return Sheet("Results", _present([*losses, *(_quantity(comparison, quantity) for quantity in RESULTS)]))


def further(comparison: Comparison) -> Sheet:
    """Makes the table of what else the runs measured: utilisation, memory by category, router health."""
    columns = [_quantity(comparison, quantity, ratios=False) for quantity in FURTHER]
    return Sheet("Memory, utilisation, router", _present(columns))


def evaluations(comparison: Comparison) -> Sheet:
    """Makes the table of named sets and tasks."""
    columns = [_quantity(comparison, quantity, ratios=False) for quantity in evaluated(comparison.runs)]
    return Sheet("Evaluations", _present(columns))


def by_phase(comparison: Comparison) -> Sheet:
    """Makes the table of bytes sent per step by phase and by link."""
    phases = [_bytes(comparison, phase, "phase") for phase in PHASES]
    links = [_part(comparison, link, wire_by_link, mib) for link in LINKS.values()]
    columns = [*phases, _quantity(comparison, SENT, "total"), *links]
    return Sheet("Communication by phase: MiB sent by rank 0 in a step", _present(columns))


def times(comparison: Comparison) -> Sheet:
    """Makes the table of time in collectives per step: measured by phase, and emulated delays by link."""

    def seconds(run: Run) -> dict[str, float]:
        measured = seconds_by_phase(run)
        total = {"total": sum(measured.values())} if measured else {}
        emulated = {f"emulated\n{link}": delay for link, delay in emulated_seconds_by_link(run).items()}
        return measured | total | emulated

    headings = [*PHASES, "total", *(f"emulated\n{link}" for link in LINKS.values())]
    columns = [_part(comparison, heading, seconds, milliseconds, timed=True) for heading in headings]
    return Sheet("Time of rank 0 in collectives: ms in a step", _present(columns))


def by_op_and_group(comparison: Comparison) -> Sheet:
    """Makes the table of bytes sent per step by operation and group."""
    return _breakdown(comparison, "Communication by operation and group: MiB sent by rank 0 in a step", "group", "op")


def by_op_and_phase(comparison: Comparison) -> Sheet:
    """Makes the table of bytes sent per step by operation and phase."""
    return _breakdown(comparison, "Communication by operation and phase: MiB sent by rank 0 in a step", "phase", "op")


def percent(changes: Sequence[float]) -> str:
    """Formats relative changes as a range: −33.3 %, +1.0 … +2.5 %, or ``unchanged``; "" if there are none."""
    texts = list(dict.fromkeys(f"{100 * x:+.1f}".replace("-", "−") for x in sorted(changes)))
    if not any(changes):
        return "unchanged" if changes else ""
    return f"{' … '.join((texts[0], texts[-1]) if len(texts) > 1 else texts)} %"


def effect_cells(effect: Effect) -> dict[str, str]:
    """Formats the effect of a change: bytes sent, step time, peak memory and losses, as far as they are known."""
    apart = "" if effect.loss_distance == math.inf else f"differ by ≤ {effect.loss_distance:.1e}"
    cells = {
        "bytes sent": percent(effect.changes(SENT)),
        "step time": _marked(percent(effect.changes(STEP_TIME)), effect.emulated),
        "peak memory": percent(effect.changes(PEAK)),
        "losses": "identical" if effect.loss_distance == 0.0 else apart,
    }
    return {name: text for name, text in cells.items() if text}


def _marked(text: str, emulated: bool) -> str:
    return f"{text} †" if text and emulated else text


def _setting(comparison: Comparison, key: str) -> Callable[[Run], Cell]:
    return lambda run: Cell(comparison.value(run, key))


def _column(comparison: Comparison, heading: str, cell: Callable[[Run], Cell]) -> Column:
    return Column(heading, [cell(run) for run in comparison.runs])


def _quantity(comparison: Comparison, quantity: Quantity, heading: str | None = None, *, ratios: bool = True) -> Column:
    def cell(run: Run) -> Cell:
        value = quantity.value(run)
        ratio = comparison.ratio(run, quantity) if ratios else None
        mark = "†" if quantity.timed and run.emulated else ""
        text = "" if value is None else f"{quantity.show(value)}{mark}"
        return Cell(text, "" if ratio is None else f"×{ratio:.2f}")

    return _column(comparison, heading or quantity.heading, cell)


def _part(
    comparison: Comparison,
    heading: str,
    parts: Callable[[Run], Mapping[str, float]],
    show: Callable[[float], str],
    *,
    timed: bool = False,
) -> Column:
    """Makes the column of one entry of ``parts``, such as one phase or link of a step."""
    return _quantity(comparison, Quantity(heading, "", lambda run: parts(run).get(heading), show, timed))


def _bytes(comparison: Comparison, heading: str, *fields: str) -> Column:
    key = tuple(heading.split("\n"))
    return _column(comparison, heading, lambda run: Cell(_mib_or_nothing(wire_by(traffic(run), *fields).get(key))))


def _breakdown(comparison: Comparison, title: str, *fields: str) -> Sheet:
    everything = [collective for run in comparison.runs for collective in traffic(run)]
    sent = {key: size / len(comparison.runs) for key, size in wire_by(everything, *fields).items() if size}
    keys = [key for key, size in sent.items() if size >= _LEAST]
    if len(keys) < len(sent):
        title += "; less than 1 KiB is left out"
    ops = sorted_ops(collective.op for collective in everything)
    keys.sort(key=lambda key: _rank(key, ops))
    return Sheet(title, [_bytes(comparison, "\n".join(key), *fields) for key in keys])


def _rank(key: tuple[str, ...], ops: Sequence[str]) -> tuple[int, str, int]:
    first, op = key
    return (PHASES.index(first) if first in PHASES else 0, first, ops.index(op))


def _mib_or_nothing(size: float | None) -> str:
    return "" if size is None else mib(size)


def _present(columns: Sequence[Column]) -> list[Column]:
    """Drops columns in which every cell is empty."""
    return [column for column in columns if any(cell.text for cell in column.cells)]
