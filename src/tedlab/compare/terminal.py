"""Prints a comparison on a terminal: as few tables as fit its width, and remarks below them."""

import sys
from dataclasses import replace
from itertools import takewhile

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tedlab.compare import sheets
from tedlab.compare.comparison import Comparison
from tedlab.compare.sheets import Sheet

WIDTH = 110
_LINES = 8  # at most so many effects are printed; the report has all


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Prints tables, statements about losses, effects and notes."""
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    width = min(console.width, WIDTH)
    settings = sheets.settings(comparison)
    shown = [make(comparison) for make in (sheets.results, sheets.by_phase, sheets.by_op_and_group, sheets.times)]
    for sheet in shown:
        if not sheet.columns:
            continue
        whole = _table(comparison, settings, sheet)
        if _width(console, whole) <= width:
            _print(console, sheet.title, whole)
            continue
        if sheet is shown[0]:
            _print_split(console, comparison, settings, width)
        _print_split(console, comparison, sheet, width)
    if not settings.columns and len(comparison.runs) > 1:
        console.print("The runs have the same settings.")
    if any(run.members for run in comparison.runs):
        console.print("Runs named a+b are means over seeds; ± is the standard deviation over them.")
    if len(comparison.runs) > 1:
        console.print(f"× is the ratio to run {escape(comparison.runs[0].name)}.")
    for statement in (*comparison.loss_statements(), *comparison.flip_statements()):
        console.print(escape(statement), style="yellow" if "differ" in statement else "green")
    effects = comparison.effects()
    for effect in effects[:_LINES]:
        what = "; ".join(f"{name} {text}" for name, text in sheets.effect_cells(effect).items())
        console.print(f"[bold]{escape(effect.change)}[/]: {what}")
    if len(effects) > _LINES:
        console.print(f"… and {len(effects) - _LINES} more changes, in the report (out=…).")
    for note in comparison.notes:
        console.print(escape(note), style="yellow")


def _print_split(console: Console, comparison: Comparison, sheet: Sheet, width: int) -> None:
    """Prints a sheet as several tables that fit the width, each with at least one column."""
    rest, title = list(sheet.columns), sheet.title
    while rest:
        heads = [replace(sheet, columns=rest[: n + 1]) for n in range(len(rest))]
        fitting = list(takewhile(lambda head: _width(console, _table(comparison, head)) <= width, heads))
        head = fitting[-1] if fitting else heads[0]
        _print(console, title, _table(comparison, head))
        rest, title = rest[len(head.columns) :], f"{sheet.title} (continued)"


def _print(console: Console, title: str, table: Table) -> None:
    """Prints a title and a table; rich would wrap a table's own title to the table's width."""
    console.print(Text(title, style="table.title"))
    console.print(table)


def _table(comparison: Comparison, *parts: Sheet) -> Table:
    table = Table()
    table.add_column("run", overflow="fold")
    for part in parts:
        for column in part.columns:
            if part.numeric:
                table.add_column(Text(column.heading), justify="right", no_wrap=True)
            else:
                table.add_column(Text(column.heading), max_width=32, overflow="fold")
    columns = [column for part in parts for column in part.columns]
    for index, run in enumerate(comparison.runs):
        table.add_row(Text(run.name), *(Text(" ".join(filter(None, column.cells[index]))) for column in columns))
    return table


def _width(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum
