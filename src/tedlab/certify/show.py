"""Certification on a terminal: a progress bar, then the table."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tedlab.certify.certificate import RUNS, Certificate, certify
from tedlab.config import TrainConfig
from tedlab.report import CERTIFICATE


def certify_visibly(config: TrainConfig) -> Certificate:
    """:func:`certify` with a progress bar; prints the table and writes ``certificate.json`` into ``output_dir``."""
    columns = (TextColumn("certifying"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=RUNS, completed=-1)
        certificate = certify(config, progress=lambda stage: bar.update(task, description=stage, advance=1))
        bar.update(task, completed=RUNS, description="")
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(certificate.layout)
    if certificate.layout != certificate.asked:
        console.print(f"(the largest layout of this shape for a laptop; asked for: {certificate.asked})")
    console.print(certificate.table())
    if certificate.culprit is not None:
        console.print(f"[red]{certificate.culprit}[/]")
    directory = Path(config.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CERTIFICATE).write_text(json.dumps(certificate.as_dict(), indent=2) + "\n")
    return certificate
