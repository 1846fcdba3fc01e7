"""``tedlab doctor [overrides]``: tests this machine, or all nodes of an allocation, and says what is wrong.

Takes the overrides of ``tedlab train``. Exits with 1 if anything is wrong.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tedlab.commands.application import hydra_entry
from tedlab.config import Backend, TrainConfig

if TYPE_CHECKING:
    from tedlab.doctor import Finding


def task(config: TrainConfig) -> None:
    """Runs all checks, prints each finding as it comes, and ends with 1 if one is wrong."""
    from rich.console import Console
    from rich.text import Text

    from tedlab.doctor import Verdict
    from tedlab.launch.outside import first_outside

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, quiet=not first_outside())
    marks = {Verdict.OK: "[green]✓[/]", Verdict.WARNING: "[yellow]![/]", Verdict.WRONG: "[red]✗[/]"}
    worst, start = Verdict.OK, time.perf_counter()
    for finding in findings(config):
        console.print(f"{marks[finding.verdict]} [bold]{finding.name}[/]", Text(finding.said))
        if finding.remedy:
            console.print("   ", Text(finding.remedy))
        worst = max(worst, finding.verdict, key=list(Verdict).index)
    ends = {
        Verdict.OK: "nothing is wrong",
        Verdict.WARNING: "it works, with the warnings above",
        Verdict.WRONG: "training would not work, or be wrong",
    }
    console.print(f"{ends[worst]} ({time.perf_counter() - start:.0f} s)")
    if worst is Verdict.WRONG:
        sys.exit(1)


def findings(config: TrainConfig) -> Iterator["Finding"]:
    """Yields what each check finds; those that need what another found wrong are left out."""
    from tedlab.doctor import Finding, Verdict, examine_machine, examine_world, judge_world
    from tedlab.errors import UsageError, WorkerFailed, WrongEnvironment
    from tedlab.launch import outside
    from tedlab.launch.launcher import launch
    from tedlab.validate import check_simulated

    here = int(config.trainer["devices"])
    wrong = False
    machine = examine_machine(
        here,
        str(config.trainer["accelerator"]),
        Path(config.output_dir, "runs"),
        share_gpus=config.comm.backend == Backend.GLOO,
    )
    for finding in machine:
        wrong = wrong or finding.verdict is Verdict.WRONG
        yield finding
    try:
        outside.check(config.parallel.world_size)
        check_simulated(config)  # what has nothing to do with this machine
    except (UsageError, WrongEnvironment) as error:
        yield Finding("configuration", str(error), Verdict.WRONG, "Correct it before anything is launched")
        return
    if wrong:
        return
    try:
        measured = launch(examine_world, config, here)
    except (WorkerFailed, RuntimeError) as error:  # the latter from torch, in processes that exist already
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        remedy = "Nodes must reach each other: check firewalls, MASTER_ADDR, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME"
        yield Finding("processes", " ".join(dict.fromkeys((lines[0], lines[-1]))), Verdict.WRONG, remedy)
        return
    if measured:  # the first process
        yield from judge_world(measured)
    if not outside.started_outside():
        yield _certified(config)


def _certified(config: TrainConfig) -> "Finding":
    from tedlab.certify import certify
    from tedlab.doctor import Finding, Verdict

    start = time.perf_counter()
    certificate = certify(config, continuations=())
    said = f"{certificate.layout}: {len(certificate.rows)} quantities in {time.perf_counter() - start:.0f} s"
    if certificate.ok:
        largest = max(row.error for row in certificate.rows)
        return Finding("a step against one process", f"{said}, equal to one process (largest error {largest:.1e})")
    return Finding(
        "a step against one process",
        f"{said}, {certificate.culprit}",
        Verdict.WRONG,
        "`tedlab certify` shows more; do not trust what this machine trains",
    )


main = hydra_entry(task, "doctor", TrainConfig)
