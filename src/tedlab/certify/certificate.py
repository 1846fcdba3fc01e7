"""The certificate, and the runs that it is made from."""

import hashlib
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

import tedlab
from tedlab.certify.compare import TOLERANCES, Row, compare, first_difference
from tedlab.certify.record import (
    FILE,
    LOSS_SCALE,
    QUANTITIES,
    Record,
    read,
    record,
    record_reference,
    record_reference_of_overflow,
)
from tedlab.certify.shrink import MOST_PROCESSES, SAVED, STEPS, reference, shrink
from tedlab.config import TrainConfig
from tedlab.degrees import ParallelDegrees, parallel_degrees
from tedlab.launch.launcher import launch
from tedlab.launch.locks import scratch
from tedlab.report import resolved_yaml
from tedlab.tables import FittingTable
from tedlab.validate import complete

CONTINUATIONS = {  # which run saves the checkpoint, and which continues from it
    "in one process": ("layout", "one"),
    "from one process": ("one", "layout"),
    "in this layout": ("layout", "layout"),  # must be bitwise equal
}
Recorded = Callable[[TrainConfig], dict[str, Any]]
Execute = Callable[[Recorded, TrainConfig], Any]  # calls a function in every process of the configuration's layout


@dataclass(frozen=True)
class Certificate:
    """The result of a certification.

    Attributes:
        layout: The degrees of the layout that was run.
        asked: The degrees of the given configuration, which are larger if they exceed the allowed processes.
        rows: The verdicts, one for each quantity and continued run.
        precision: The precision that the runs computed in.
        accelerator: The accelerator that they ran on.
        fingerprint: A hash of the configuration that was run, tedlab's source, torch's version and the machine type.
    """

    layout: str
    asked: str
    rows: tuple[Row, ...]
    precision: str
    accelerator: str
    fingerprint: str

    @property
    def ok(self) -> bool:
        """Whether the layout trains exactly as one process."""
        return all(row.ok for row in self.rows)

    @property
    def culprit(self) -> Row | None:
        """The difference that appears first, which is the likeliest cause of the others; None if all are equal."""
        return first_difference(self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Returns the certificate as a dictionary for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def table(self) -> Table:
        """Returns the certificate as a table for people."""
        table = FittingTable(title="equal to one process" if self.ok else "NOT equal to one process")
        for heading in ("quantity", "tensors", "largest error", "verdict"):
            table.add_column(heading, justify="right" if heading in ("tensors", "largest error") else "left")
        for row in self.rows:
            verdict = "equal" if row.ok else Text(f"differs from step {row.step} on", "red")
            table.add_row(row.quantity, str(row.compared), f"{row.error:.1e}", verdict)
        precision = {"64-true": "float64", "bf16-true": "bf16, within rounding"}[self.precision]
        table.caption = f"{precision}, on {self.accelerator}; relative errors; fingerprint {self.fingerprint}"
        return table


def certify(
    config: TrainConfig,
    execute: Execute | None = None,
    progress: Callable[[str], None] = lambda stage: None,
    continuations: Iterable[str] = CONTINUATIONS,
    most_processes: int = MOST_PROCESSES,
) -> Certificate:
    """Runs a scaled-down ``config`` in its layout and in one process, and compares everything.

    The runs compute in ``config.certificate_precision`` (float64 by default), on the configuration's accelerator if
    this machine has enough of them.

    There are five runs: a few steps in one process; the same steps in the layout; each of the two continued by the
    other, from a checkpoint in the middle of an epoch into the next one; and the layout continued by itself, which must
    be bitwise equal.

    Args:
        config: Any training configuration.
        execute: Runs a function of ``record.py`` in every process; by default in new processes on this machine.
        progress: Called with a description of each run before it starts.
        continuations: The keys of :data:`CONTINUATIONS` to run.
        most_processes: The most processes to use; a larger layout is scaled down.

    Raises:
        UsageError: If the configuration is not valid.
    """
    with scratch("certify") as directory:
        runs = runs_for(config, directory, tuple(continuations), most_processes)
        for stage, run, small in runs.planned():
            progress(stage)
            (execute or _launched)(run, small)
        rows = tuple(runs.compared())
        fingerprint = _fingerprint(runs.layout, directory)
    asked = parallel_degrees(config.parallel)
    accelerator = str(runs.layout.trainer["accelerator"])
    return Certificate(str(runs.degrees), str(asked), rows, config.certificate_precision, accelerator, fingerprint)


@dataclass(frozen=True)
class Runs:
    """The runs of a certificate, each of which writes a record to its ``output_dir``.

    Attributes:
        layout: The configuration to be judged.
        one: The one-process configuration that it is judged by.
        degrees: The degrees of the layout.
        continuations: The keys of :data:`CONTINUATIONS` to run.
        steps: The number of steps of a run.
    """

    layout: TrainConfig
    one: TrainConfig
    degrees: ParallelDegrees
    continuations: tuple[str, ...]
    steps: int = STEPS

    def planned(self) -> Iterator[tuple[str, Recorded, TrainConfig]]:
        """Yields the runs in order: a heading, and a function with the configuration to call it with."""
        runs = self._runs
        yield f"one process, {self.steps} steps", runs["one"], self.one
        yield f"{self.degrees.world_size} processes, {self.steps} steps", runs["layout"], self.layout
        for name in self.continuations:
            yield f"continued {name}", runs[CONTINUATIONS[name][1]], self._continued(name)

    def compared(self) -> Iterator[Row]:
        """Yields a row for each quantity and one for each continued run, once all planned runs are done."""
        expected, found = _read(self.one), _read(self.layout)
        # In float64 each tensor is compared separately, otherwise all of them together; see TOLERANCES.
        precision = self.layout.certificate_precision
        within = TOLERANCES[precision], precision != "64-true"
        yield from compare(found, expected, self.degrees, *within, steps=range(1, self.steps + 1))
        for name in self.continuations:
            resumed, steps = _read(self._continued(name)), range(SAVED + 1, self.steps + 1)
            if len(set(CONTINUATIONS[name])) == 1:
                quantities = (*QUANTITIES, LOSS_SCALE) if self._scaled else QUANTITIES
                rows = compare(resumed, found, self.degrees, 0.0, steps=steps, quantities=quantities)
            else:
                rows = compare(resumed, expected, self.degrees, *within, steps=steps)
            yield _summary(f"checkpoint continued {name}", rows)

    @property
    def _scaled(self) -> bool:
        return self.layout.optim.loss_scale is not None

    @property
    def _runs(self) -> dict[str, Recorded]:
        return {"layout": record, "one": record_reference_of_overflow if self._scaled else record_reference}

    def _continued(self, name: str) -> TrainConfig:
        source, target = ({"layout": self.layout, "one": self.one}[party] for party in CONTINUATIONS[name])
        saved = Path(source.output_dir, "checkpoints", f"step_{SAVED}.ckpt")
        directory = f"{Path(target.output_dir).name}_from_{Path(source.output_dir).name}"
        return replace(target, ckpt_path=str(saved), output_dir=str(Path(target.output_dir).with_name(directory)))


def runs_for(config: TrainConfig, directory: Path, continuations: tuple[str, ...], most_processes: int) -> Runs:
    """Returns the runs that certify ``config`` in ``directory``; :func:`certify` describes the other arguments.

    Raises:
        UsageError: If the configuration is not valid.
    """
    layout = shrink(config, directory, most_processes)
    one = reference(layout, directory)
    continued = {CONTINUATIONS[name][0] for name in continuations}
    layout, one = (
        complete(run if party in continued else _without_checkpoints(run), most)
        for party, run, most in (("layout", layout, most_processes), ("one", one, None))
    )
    return Runs(layout, one, parallel_degrees(layout.parallel), continuations)


def _without_checkpoints(config: TrainConfig) -> TrainConfig:
    return replace(config, checkpoint=replace(config.checkpoint, every=STEPS + 1))


def _read(config: TrainConfig) -> Record:
    return read(Path(config.output_dir, FILE))


def _summary(name: str, rows: list[Row]) -> Row:
    """Summarises all quantities of a continued run in one row."""
    worst, compared = max(row.error for row in rows), sum(row.compared for row in rows)
    wrong = first_difference(rows)
    if wrong is None:
        return Row(name, worst, compared, 0, "", "", rows[0].tolerance)
    return Row(name, worst, compared, wrong.step, f"{wrong.quantity}: {wrong.first}", wrong.hint, wrong.tolerance)


def _launched(run: Recorded, config: TrainConfig) -> None:
    launch(run, config, config.parallel.world_size)


def _fingerprint(config: TrainConfig, directory: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    digest.update(resolved_yaml(config).replace(str(directory), "").encode())
    digest.update(f"torch {version('torch')}, {platform.machine()}".encode())
    for file in sorted(Path(tedlab.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
