"""Reads finished runs from disk (configuration, summary, loss curves), and finds the run directories of a path."""

import csv
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tedlab.errors import UsageError
from tedlab.hints import did_you_mean
from tedlab.history import steps_done
from tedlab.launch.outcome import FAILED, FINISHED, METRICS, SUMMARY
from tedlab.renamed import nested
from tedlab.untrusted import flat, read_yaml

CONFIG = "config.yaml"
_NUMBERS = ("train/", "val/", "perf/", "comm/", "memory/", "router/", "parameters/")  # prefixes of numeric values
_LARGEST = 1 << 63
CURVES = ("train/loss", "val/loss")

Curve = list[tuple[int, float]]


class Unfinished(Exception):
    """A run has nothing to compare; the message says why."""


@dataclass(frozen=True)
class Run:
    """One finished run, wherever it was read from.

    Attributes:
        name: Short name that no other run of the comparison has.
        source: Its directory, or its address on a W&B server.
        config: Every value of the configuration under its dotted key.
        summary: The content of ``summary.json``.
        curves: For each of ``CURVES``, the pairs (steps done, value) in order; empty if it was never logged.
    """

    name: str
    source: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    curves: Mapping[str, Curve]

    @property
    def simulated(self) -> str | None:
        """The cluster for which ``tedlab simulate`` predicted this run; None if the run really happened."""
        return self.config.get("sim.cluster")

    @property
    def emulated(self) -> str | None:
        """The emulated or simulated cluster whose times these are; None if the times were measured."""
        cluster = self.simulated or self.config.get("comm.emulate")
        if cluster is None and any(key.endswith("/emulated_seconds") for key in self.summary):
            return "unnamed cluster"
        return None if cluster is None else str(cluster)

    def number(self, key: str) -> float | None:
        """Returns a value of the summary as a float; None if it is missing or not a number."""
        value = self.summary.get(key)
        return float(value) if isinstance(value, int | float) else None


def read_runs(paths: Sequence[Path], stopped: bool = False) -> tuple[list[Run], list[str]]:
    """Reads the finished runs of run and sweep directories.

    Args:
        paths: Run and sweep directories.
        stopped: Whether to include runs that failed or were interrupted; their names then say so.

    Returns:
        The runs, and a note for each run that is left out.

    Raises:
        UsageError: If a path does not exist or holds no run, or if no run has finished.
    """
    directories = list(dict.fromkeys(d.resolve() for path in paths for d in _run_directories(path)))
    runs, notes = [], []
    for directory, name in zip(directories, _names(directories), strict=True):
        try:
            runs.append(_read(directory, name, stopped))
        except Unfinished as reason:
            notes.append(f"{directory} is left out: {reason}")
    if not runs:
        raise UsageError("\n".join(["There is no finished run to compare.", *notes]))
    return runs, notes


def first_of(runs: Sequence[Run], name: str) -> list[Run]:
    """Returns the runs in order, but with the one of this name first.

    Raises:
        UsageError: If there is no such run; the message lists the names.
    """
    chosen = [run for run in runs if name in (run.name, run.source)]
    if not chosen:
        names = [run.name for run in runs]
        raise UsageError(
            f"baseline={name}: there is no such run.{did_you_mean(name, names)}\nValid: {', '.join(names)}"
        )
    return [*chosen, *(run for run in runs if run not in chosen)]


def how_it_stopped(summary: Mapping[str, Any]) -> str | None:
    """Says how a run ended that did not finish; returns None for a finished run, or one that does not say."""
    state = summary.get("state", FINISHED)
    if state == FINISHED:
        return None
    return f"{state} at step {summary.get('steps')}"


def why_left_out(summary: Mapping[str, Any]) -> str:
    """Says why a run that failed or was interrupted is left out, as a clause that begins with "it"."""
    verb = "failed" if summary["state"] == FAILED else f"was {summary['state']}"
    stopped = f"it {verb} at step {summary.get('steps')} ({flat(summary.get('reason'))})"
    return f"{stopped}; force=true compares it as far as it came."


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dictionaries into one with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def curves(rows: Iterable[Mapping[str, Any]], step_key: str, steps: int) -> dict[str, Curve]:
    """Extracts the loss curves from logged rows.

    Args:
        rows: Rows of metrics; a metric that was not logged at a row's step is absent, empty or None.
        step_key: Key under which a row has its step; see :func:`tedlab.history.steps_done`.
        steps: Number of steps of the run, at which steps are capped.
    """
    found: dict[str, Curve] = {name: [] for name in CURVES}
    for row in rows:
        for name, curve in found.items():
            if row.get(name) not in (None, ""):
                curve.append((min(steps_done(row, step_key), steps), float(row[name])))
    return found


def _run_directories(path: Path) -> list[Path]:
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        raise UsageError(f"There is no folder {path}." + (f" Did you mean {path.parent / near[0]}?" if near else ""))
    if not path.is_dir():
        raise UsageError(f"{path} is a file. Give the directory of a run or of a sweep: {path.parent}?")
    if (path / CONFIG).exists():
        return [path]
    jobs = [p for p in path.iterdir() if p.is_dir() and (p.name.isdigit() or (p / CONFIG).exists())]
    if not jobs:
        deeper = sorted({str(config.parent.parent) for config in path.glob(f"*/*/{CONFIG}")})
        raise UsageError(
            f"{path} is no run directory (it has no {CONFIG}), and there is none directly below it."
            + (f"\nThese hold runs: {', '.join(deeper[:5])}" if deeper else "")
        )
    return sorted(jobs, key=lambda p: (not p.name.isdigit(), int(p.name) if p.name.isdigit() else 0, p.name))


def _names(directories: Sequence[Path]) -> list[str]:
    """Returns the shortest endings of the paths, with equally many parts, that tell them apart."""
    depth, names = 0, [""] * len(directories)
    while len(set(names)) < len(directories) or depth == 0:
        depth += 1
        names = ["/".join(directory.parts[-depth:]) for directory in directories]
    return names


def _read(directory: Path, name: str, stopped: bool) -> Run:
    for needed, meaning in ((CONFIG, "it never started"), (SUMMARY, "it has not finished")):
        if not (directory / needed).exists():
            raise Unfinished(f"{meaning} (there is no {needed}).")
    summary = _summary(directory)
    try:
        config = flatten(nested(read_yaml(directory / CONFIG)))
    except (OSError, ValueError, RecursionError) as error:
        raise Unfinished(f"{CONFIG} cannot be read ({error}).") from None
    if (how := how_it_stopped(summary)) is not None:
        if not stopped:
            raise Unfinished(why_left_out(summary))
        name = f"{name} ({how})"
    metrics = directory / METRICS
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        losses = curves(csv.DictReader(lines), "step", summary["steps"])
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise Unfinished(f"{METRICS} is damaged ({type(error).__name__}: {error}).") from None
    return Run(name, str(directory), config, summary, losses)


def _summary(directory: Path) -> dict[str, Any]:
    try:
        summary = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Unfinished(f"{SUMMARY} is no whole JSON ({error}).") from None
    if not isinstance(summary, dict) or "steps" not in summary:
        raise Unfinished(f"{SUMMARY} does not say how many steps it took.")
    counts = {key: summary[key] for key in ("steps", "comm/steps") if key in summary}
    wrong = {key: value for key, value in counts.items() if type(value) is not int or not 0 <= value < _LARGEST}
    wrong |= {key: value for key, value in summary.items() if key.startswith(_NUMBERS) and not _is_number(value)}
    for key, value in wrong.items():
        raise Unfinished(f"{SUMMARY} is damaged ({key} is {str(value)[:40]!r}, which it cannot be).")
    return summary


def _is_number(value: Any) -> bool:
    """Tells whether a summary value may stand for a number: a number, None, or a list with one for each rank."""
    if value is None or isinstance(value, list):
        return True
    return isinstance(value, float) or (type(value) is int and abs(value) < _LARGEST)
