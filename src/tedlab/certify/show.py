"""Shows a certification on a terminal: a progress bar, then the table."""

import json
import sys
from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tedlab.certify.certificate import CONTINUATIONS, Certificate, Execute, certify
from tedlab.certify.shrink import MOST_PROCESSES
from tedlab.config import TrainConfig
from tedlab.report import CERTIFICATE


def certify_visibly(
    config: TrainConfig,
    execute: Execute | None = None,
    continuations: Collection[str] = CONTINUATIONS,
    most_processes: int = MOST_PROCESSES,
) -> Certificate:
    """Calls :func:`certify` with a progress bar, prints the table and writes ``output_dir/certificate.json``."""
    runs = 2 + len(continuations)
    columns = (TextColumn("certifying"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=runs, completed=-1)
        certificate = certify(
            config, execute, lambda stage: bar.update(task, description=stage, advance=1), continuations, most_processes
        )
        bar.update(task, completed=runs, description="")
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(certificate.layout)
    if certificate.layout != certificate.asked:
        console.print(f"(asked for {certificate.asked}; this is the largest like it of at most {most_processes})")
    console.print(certificate.table())
    if certificate.culprit is not None:
        console.print(f"[red]{certificate.culprit}[/]")
    directory = Path(config.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CERTIFICATE).write_text(json.dumps(certificate.as_dict(), indent=2) + "\n")
    return certificate
