"""Shows a certification on a terminal: a progress bar, then the table."""

import json
from collections.abc import Collection
from pathlib import Path

from tedlab.certify.certificate import CONTINUATIONS, Certificate, Execute, certify
from tedlab.certify.shrink import MOST_PROCESSES
from tedlab.config import TrainConfig
from tedlab.console import output
from tedlab.progress import CommandProgress
from tedlab.report import CERTIFICATE


def certify_visibly(
    config: TrainConfig,
    execute: Execute | None = None,
    continuations: Collection[str] = CONTINUATIONS,
    most_processes: int = MOST_PROCESSES,
) -> Certificate:
    """Calls :func:`certify` with a progress bar, prints the table and writes ``output_dir/certificate.json``."""
    runs = 2 + len(continuations)
    with CommandProgress() as bar:
        task = bar.add_task("certifying", total=runs, completed=-1)

        def tell(stage: str) -> None:
            bar.update(task, description=f"certifying: {stage}", advance=1)

        certificate = certify(config, execute, tell, continuations, most_processes)
    console = output()
    console.print(certificate.layout)
    if certificate.layout != certificate.asked:
        console.print(f"(asked for {certificate.asked}; this is the largest like it of at most {most_processes})")
    console.print(certificate.table())
    if certificate.culprit is not None:
        console.print(str(certificate.culprit), style="red")
    directory = Path(config.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CERTIFICATE).write_text(json.dumps(certificate.as_dict(), indent=2) + "\n")
    return certificate
