"""Writes the settings and results of a comparison as a table for other programs: CSV with raw numbers, or LaTeX."""

import csv
import re
from pathlib import Path

from tedlab.compare import sheets
from tedlab.compare.comparison import Comparison
from tedlab.compare.quantities import FURTHER, RESULTS, evaluated
from tedlab.compare.runs import CURVES
from tedlab.compare.seeds import deviation

_ESCAPED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "×": r"$\times$",
    "–": "--",
    "±": r"$\pm$",
}
_SPECIAL = re.compile(r"[\\~^×–±#$%&_{}]")


def write_table(comparison: Comparison, path: Path) -> Path:
    """Writes the table in the format of the file's ending, and returns the path.

    CSV has the numbers of the runs in bytes and seconds, unrounded, and says of each run whether its times were
    measured, emulated or predicted. LaTeX has the rounded numbers of the terminal, with ratios, for the package
    booktabs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        _write_csv(comparison, path)
    else:
        path.write_text(_latex(comparison), encoding="utf-8")
    return path


def _write_csv(comparison: Comparison, path: Path) -> None:
    quantities = {quantity.heading.replace("\n", " "): quantity for quantity in (*RESULTS, *FURTHER)}
    found = {quantity.heading.replace("\n", "/"): quantity for quantity in evaluated(comparison.runs)}
    names = {heading: _unit_of_si(heading) for heading in quantities}
    rows = []
    for run in comparison.runs:
        times = "predicted" if run.simulated else "emulated" if run.emulated else "measured"
        row: dict[str, object] = {"run": run.name, "times": times}
        row |= {key: comparison.value(run, key) for key in comparison.settings}
        row |= {curve: run.number(curve) for curve in CURVES}
        row |= {f"{curve} deviation": deviation(run, curve) for curve in CURVES}
        row |= {names[heading]: quantity.value(run) for heading, quantity in quantities.items()}
        row |= {key: quantity.value(run) for key, quantity in found.items()}
        rows.append(row)
    present = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, present, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _unit_of_si(heading: str) -> str:
    """Names a column by the unit in which its quantity is kept, not by that in which tables show it."""
    name = heading.replace("ms/step", "s/step").replace("MiB", "bytes")
    return re.sub(r" %$", " share", name) if name != "MFU %" else "MFU share"


def _latex(comparison: Comparison) -> str:
    settings, results = sheets.settings(comparison), sheets.results(comparison)
    columns = [*settings.columns, *results.columns]
    layout = "l" * (1 + len(settings.columns)) + "r" * len(results.columns)
    lines = [rf"\begin{{tabular}}{{{layout}}}", r"\toprule"]
    heads = ["run", *(column.heading.replace("\n", " ") for column in columns)]
    lines += [_row(heads), r"\midrule"]
    for number, run in enumerate(comparison.runs):
        cells = [column.cells[number] for column in columns]
        lines.append(_row([run.name, *(f"{cell.text} {cell.ratio}".strip() for cell in cells)]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _row(texts: list[str]) -> str:
    return " & ".join(_SPECIAL.sub(lambda m: _ESCAPED.get(m[0], f"\\{m[0]}"), text) for text in texts) + r" \\"
