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

_STEP = "a step against one process"


def task(config: TrainConfig) -> None:
    """Runs all checks, prints each finding as it comes, and ends with 1 if one is wrong."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from tedlab.console import output
    from tedlab.doctor import Verdict
    from tedlab.launch.outside import first_outside

    console = output(quiet=not first_outside())
    marks = {
        Verdict.SKIPPED: ("–", "dim"),
        Verdict.OK: ("✓", "green"),
        Verdict.WARNING: ("!", "yellow"),
        Verdict.WRONG: ("✗", "red"),
    }
    worst, start = Verdict.OK, time.perf_counter()
    for finding in findings(config):
        shown = Table.grid(padding=(0, 1))  # wraps beside the mark
        shown.add_row(Text(*marks[finding.verdict]), Text.assemble((finding.name, "bold"), f": {finding.said}"))
        if finding.remedy:
            shown.add_row("", Padding(finding.remedy, (0, 0, 0, 2)))
        console.print(shown)
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
    from tedlab.launch.joining import local_rank
    from tedlab.launch.launcher import launch
    from tedlab.validate import check_simulated

    devices = config.trainer["devices"]
    if not isinstance(devices, int) or devices < 1:
        said = f"trainer.devices={devices} is no number of processes on each machine"
        yield Finding("configuration", said, Verdict.WRONG, "Give the number, such as trainer.devices=4")
        return
    # Processes that exist already all go on to the next check, since they wait for each other there. One on each
    # machine looks at it; the first tells of what others have found.
    together, machine = outside.started_outside(), []
    if not together or local_rank() == 0:
        share_gpus = config.comm.backend == Backend.GLOO
        accelerator, output = str(config.trainer["accelerator"]), Path(config.output_dir, "runs")
        for finding in examine_machine(devices, accelerator, output, share_gpus):
            machine.append(finding)
            yield finding
    try:
        outside.check(config.parallel.world_size)
        check_simulated(config)  # what has nothing to do with this machine
    except (UsageError, WrongEnvironment) as error:
        yield Finding("configuration", str(error), Verdict.WRONG, "Correct it before anything is launched")
        return
    if not together and any(finding.verdict is Verdict.WRONG for finding in machine):
        return
    try:
        measured = examine_world(config, machine) if together else launch(examine_world, config, devices)
    except (WorkerFailed, RuntimeError) as error:  # the latter from torch, in processes that exist already
        remedy = "Nodes must reach each other: check firewalls, MASTER_ADDR, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME"
        yield Finding("processes", _in_brief(error), Verdict.WRONG, remedy)
        return
    if measured:  # the first process
        yield from judge_world(measured)
    yield _not_certified() if together else _certified(config)


def _in_brief(error: Exception) -> str:
    """Returns the first and the last line of an error's message, or its name if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(dict.fromkeys((lines[0], lines[-1])))


def _not_certified() -> "Finding":
    from tedlab.doctor import Finding, Verdict

    said = "not tested here: it would start processes of its own. `tedlab certify` tests it on one machine"
    return Finding(_STEP, said, Verdict.SKIPPED)


def _certified(config: TrainConfig) -> "Finding":
    from tedlab.certify import certify
    from tedlab.doctor import Finding, Verdict
    from tedlab.errors import UsageError, WorkerFailed

    start = time.perf_counter()
    try:
        certificate = certify(config, continuations=())
    except (UsageError, WorkerFailed, ValueError, RuntimeError, OSError) as error:
        return Finding(_STEP, _in_brief(error), Verdict.WRONG, "`tedlab certify` with the same overrides shows more")
    said = f"{certificate.layout}: {len(certificate.rows)} quantities in {time.perf_counter() - start:.0f} s"
    if certificate.ok:
        largest = max(row.error for row in certificate.rows)
        return Finding(_STEP, f"{said}, equal to one process (largest error {largest:.1e})")
    return Finding(
        _STEP,
        f"{said}, {certificate.culprit}",
        Verdict.WRONG,
        "`tedlab certify` shows more; do not trust what this machine trains",
    )


main = hydra_entry(task, "doctor", TrainConfig)
