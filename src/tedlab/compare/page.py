"""Writes a comparison as one self-contained HTML file: no scripts, no other files, no network."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from tedlab.compare import sheets
from tedlab.compare.charts import Chart, charts
from tedlab.compare.comparison import Comparison
from tedlab.compare.quantities import FURTHER, RESULTS, evaluated
from tedlab.compare.traffic import traffic
from tedlab.degrees import ParallelDegrees


def page(comparison: Comparison, drawn: Sequence[Chart]) -> str:
    """Renders the report as HTML, with everything that comes from a run escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["exact"] = exact
    environment.filters["layout"] = layout
    template = environment.from_string((files("tedlab.compare") / "page.html").read_text())
    results, more = sheets.results(comparison), sheets.further(comparison)
    evaluations = sheets.evaluations(comparison)
    communication = [
        make(comparison) for make in (sheets.by_phase, sheets.by_op_and_phase, sheets.by_op_and_group, sheets.times)
    ]
    shown = {column.heading for sheet in (results, evaluations, more) for column in sheet.columns}
    headline = comparison.headline()
    return template.render(
        comparison=comparison,
        settings=sheets.settings(comparison),
        results=results,
        more=more,
        evaluations=evaluations,
        communication=[sheet for sheet in communication if sheet.columns],
        charts=drawn,
        headline=headline,
        headline_cells=sheets.effect_cells(headline) if headline else {},
        effects=[(effect, sheets.effect_cells(effect)) for effect in comparison.effects()],
        collectives=[(run, traffic(run)) for run in comparison.runs],
        averaged=any(run.members for run in comparison.runs),
        definitions=[q for q in (*RESULTS, *evaluated(comparison.runs), *FURTHER) if q.heading in shown],
    )


def write(comparison: Comparison, out: Path) -> Path:
    """Writes the report to ``out``, and its charts as PNG into the folder ``<stem>_charts`` beside it."""
    drawn = charts(comparison)
    folder = out.with_name(f"{out.stem}_charts")
    folder.mkdir(parents=True, exist_ok=True)
    for chart in drawn:
        (folder / f"{chart.name}.png").write_bytes(chart.light)
    out.write_text(page(comparison, drawn), encoding="utf-8")
    return out


def layout(stored: Mapping[str, Any]) -> str:
    """Formats the layout in a summary as commands print it; one that is none of ours by its names and values."""
    ours = {field.name: stored[field.name] for field in fields(ParallelDegrees) if field.name in stored}
    try:
        return str(ParallelDegrees(**ours))
    except (TypeError, ValueError, ArithmeticError):
        return ", ".join(f"{name} {size}" for name, size in stored.items())


def exact(value: float) -> str:
    """Formats a number of bytes or calls per step: a whole number without decimals, any other with two."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.2f}"
