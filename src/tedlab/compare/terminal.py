"""Prints a comparison on a terminal: settings beside results where there is room, and remarks below."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tedlab.compare import sheets
from tedlab.compare.comparison import Comparison
from tedlab.compare.sheets import Sheet
from tedlab.console import output
from tedlab.tables import FittingTable

_SHEETS = (sheets.results, sheets.evaluations, sheets.by_phase, sheets.by_op_and_group, sheets.times)
_LINES = 8  # at most so many effects are printed; the report has all


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Prints tables, statements about losses, effects and notes."""
    console = console or output()
    settings = sheets.settings(comparison)
    shown = [make(comparison) for make in _SHEETS]
    for sheet in shown:
        if not sheet.columns:
            continue
        whole = _table(comparison, sheet.title, settings, sheet)
        if _width(console, whole) <= console.width:
            console.print(whole)
            continue
        if sheet is shown[0] and settings.columns:
            console.print(_table(comparison, settings.title, settings))
        console.print(_table(comparison, sheet.title, sheet))
    if not settings.columns and len(comparison.runs) > 1:
        console.print("The runs have the same settings.")
    if any(run.members for run in comparison.runs):
        console.print("Runs named a+b are means over seeds; ± is the standard deviation over them.")
    if len(comparison.runs) > 1:
        console.print(f"× is the ratio to run {comparison.runs[0].name}.")
    for statement in (*comparison.loss_statements(), *comparison.flip_statements()):
        console.print(statement, style="yellow" if "differ" in statement else "green")
    effects = comparison.effects()
    for effect in effects[:_LINES]:
        what = "; ".join(f"{name} {text}" for name, text in sheets.effect_cells(effect).items())
        console.print(Text.assemble((effect.change, "bold"), f": {what}"))
    if len(effects) > _LINES:
        console.print(f"… and {len(effects) - _LINES} more changes, in the report (out=…).")
    for note in comparison.notes:
        console.print(note, style="yellow")


def _table(comparison: Comparison, title: str, *parts: Sheet) -> Table:
    table = FittingTable(title=title)
    table.add_column("run")
    for part in parts:
        for column in part.columns:
            if part.numeric:
                table.add_column(Text(column.heading), justify="right")
            else:
                table.add_column(Text(column.heading), max_width=32)
    columns = [column for part in parts for column in part.columns]
    for index, run in enumerate(comparison.runs):
        table.add_row(Text(run.name), *(Text(" ".join(filter(None, column.cells[index]))) for column in columns))
    return table


def _width(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum
