"""Reads runs from disk (configuration, summary, loss curves), and finds the run directories of a path."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tedlab.errors import UsageError
from tedlab.evaluation import results as evaluations
from tedlab.hints import did_you_mean
from tedlab.history import TOKENS, UNREADABLE, read_history
from tedlab.launch.listing import KILLED, RUNNING
from tedlab.launch.locks import is_in_use
from tedlab.launch.outcome import FAILED, FINISHED, INTERRUPTED, METRICS, PRUNED, SUMMARY, last_logged
from tedlab.renamed import nested
from tedlab.untrusted import flat, printable, read_yaml

CONFIG = "config.yaml"
_LEARNED = (
    "train/",
    "val/",
    "eval/",
    "router/",
)  # prefixes of numbers that are infinite, or none, where training diverged …
_COUNTED = ("perf/", "comm/", "memory/", "parameters/")  # … and of those that never are
EVALUATIONS = "evaluations"  # the key of settings of evaluations by name
_MAPPINGS = ("layout", "versions")
_LARGEST = 1 << 63
CURVES = ("train/loss", "val/loss")

_STEP_TIME = "perf/step_time_s"
_OF_WANDB = ("crashed", "pending", "preempting", "preempted")  # states that tedlab does not write
_STATES = (FINISHED, FAILED, INTERRUPTED, PRUNED, RUNNING, KILLED, *_OF_WANDB)
_WORDED = {FAILED: "it failed", "crashed": "it crashed", RUNNING: "it is running, now"}

Curve = list[tuple[int, float]]
Clock = Mapping[int, float]  # steps done → tokens read, or seconds trained, by then


class Unfinished(Exception):
    """A run has nothing to compare; the message says why."""


@dataclass(frozen=True)
class Run:
    """One run, wherever it was read from.

    Attributes:
        name: Short name that no other run of the comparison has.
        source: Its directory, or its address on a W&B server.
        config: Every value of the configuration under its dotted key.
        summary: The content of ``summary.json``; of a run that has none, what it logged last.
        curves: For each of ``CURVES``, the pairs (steps done, value) in order; empty if it was never logged.
        tokens: The tokens read by each step that was logged; empty if the run's version did not log them.
        seconds: The seconds of training, without validation, up to each step that was logged.
        members: The runs of which this one is the mean (:mod:`tedlab.compare.seeds`); empty if it is a run itself.
    """

    name: str
    source: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    curves: Mapping[str, Curve]
    tokens: Clock = field(default_factory=dict)
    seconds: Clock = field(default_factory=dict)
    members: Sequence["Run"] = ()

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

    @property
    def unfinished(self) -> bool:
        """Whether the run is going on, or ended otherwise than planned."""
        return how_it_stopped(self.summary) is not None

    def number(self, key: str) -> float | None:
        """Returns a value of the summary as a float; None if it is missing or not a number."""
        value = self.summary.get(key)
        return float(value) if isinstance(value, int | float) else None


def read_runs(paths: Sequence[Path], stopped: bool = False) -> tuple[list[Run], list[str]]:
    """Reads the runs of run and sweep directories.

    Args:
        paths: Run and sweep directories.
        stopped: Whether to include runs that have not finished: that are going on, failed, or were interrupted or
            killed. Their names then say so.

    Returns:
        The runs, and a note for each run that is left out. No text in them steers a terminal.

    Raises:
        UsageError: If a path does not exist or holds no run, or if no run has finished.
    """
    directories = list(dict.fromkeys(d.resolve() for path in paths for d in _run_directories(path)))
    runs, notes = [], []
    for directory, name in zip(directories, _names(directories), strict=True):
        try:
            runs.append(_read(directory, name, stopped))
        except Unfinished as reason:
            notes.append(printable(f"{directory} is left out: {reason}"))
    if not runs:
        raise UsageError("\n".join(["There is no finished run to compare.", *notes]))
    return runs, notes


def first_of(runs: Sequence[Run], name: str) -> list[Run]:
    """Returns the runs in order, but with the one of this name, or the mean that holds it, first.

    Raises:
        UsageError: If there is no such run; the message lists the names.
    """
    chosen = [run for run in runs if name in (run.name, run.source, *(member.name for member in run.members))]
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
    """Says why a run that has not finished is left out, as a clause that begins with "it"."""
    state = summary["state"]
    stopped = _WORDED.get(state, f"it was {state}")
    reason = f" ({flat(summary['reason'])})" if summary.get("reason") else ""
    return f"{stopped} at step {summary.get('steps')}{reason}; force=true compares it as far as it came."


def checked(summary: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a summary, which may come from others, with texts that steer no terminal.

    Args:
        summary: The summary; it has ``steps``.
        where: What the message calls it.

    Raises:
        Unfinished: If it has a value that no run writes.
    """
    try:
        plain: dict[str, Any] = printable(summary)
    except RecursionError:
        raise Unfinished(f"{where} is nested too deeply.") from None
    for key, value in plain.items():
        if not _can_be(key, value):
            raise Unfinished(f"{where} is damaged ({key} is {str(value)[:40]!r}, which it cannot be).")
    return plain


def _can_be(key: str, value: Any) -> bool:
    """Tells whether a summary may have this value; a number may also be None, or a list with one for each rank."""
    if key in ("steps", "comm/steps"):
        return type(value) is int and 0 <= value < _LARGEST
    if key == "state":
        return value in _STATES
    if key in _MAPPINGS:
        return isinstance(value, Mapping)
    if key == EVALUATIONS:
        return isinstance(value, Mapping) and all(isinstance(settings, Mapping) for settings in value.values())
    if type(value) is int:
        return abs(value) < _LARGEST
    if value is None or isinstance(value, list) or not key.startswith((*_LEARNED, *_COUNTED)):
        return True
    return isinstance(value, float) and (key.startswith(_LEARNED) or abs(value) < _LARGEST)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dictionaries into one with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def logged(rows: Iterable[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """Extracts from logged rows what a :class:`Run` keeps of them: ``curves``, ``tokens`` and ``seconds``.

    Args:
        rows: Rows of metrics, with the steps done as ``step``; a metric that was not logged then is absent or None.
        steps: Number of steps of the run, at which steps are capped.
    """
    curves: dict[str, Curve] = {name: [] for name in CURVES}
    tokens: dict[int, float] = {}
    seconds: dict[int, float] = {0: 0.0}
    before = 0
    for row in rows:
        step = min(int(row["step"]), steps)
        for name, curve in curves.items():
            if row.get(name) is not None:
                curve.append((step, float(row[name])))
        if row.get(TOKENS) is not None:
            tokens[step] = float(row[TOKENS])
        if row.get(_STEP_TIME) is not None:  # the mean since the row before
            seconds[step] = seconds[before] + (step - before) * float(row[_STEP_TIME])
            before = max(before, step)
    return {"curves": curves, "tokens": tokens, "seconds": seconds if len(seconds) > 1 else {}}


def _run_directories(path: Path) -> list[Path]:
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        raise UsageError(
            f"There is no folder {path}." + (f" Did you mean {path.parent / printable(near[0])}?" if near else "")
        )
    if not path.is_dir():
        raise UsageError(f"{path} is a file. Give the directory of a run or of a sweep: {path.parent}?")
    if (path / CONFIG).exists():
        return [path]
    jobs = [p for p in path.iterdir() if p.is_dir() and (p.name.isdigit() or (p / CONFIG).exists())]
    if not jobs:
        deeper = sorted({str(config.parent.parent) for config in path.glob(f"*/*/{CONFIG}")})
        raise UsageError(
            f"{path} is no run directory (it has no {CONFIG}), and there is none directly below it."
            + (f"\nThese hold runs: {', '.join(map(printable, deeper[:5]))}" if deeper else "")
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
    if not (directory / CONFIG).exists():
        raise Unfinished(f"it never started (there is no {CONFIG}).")
    summary = _summary(directory) if (directory / SUMMARY).exists() else _so_far(directory)
    try:
        found = evaluations.read(directory)
    except ValueError as error:
        raise Unfinished(f"{error}.") from None
    if found.metrics:
        summary = {**summary, **found.metrics, EVALUATIONS: found.settings}
    summary = checked(summary, SUMMARY)
    try:
        config = flatten(printable(nested(read_yaml(directory / CONFIG))))
    except (OSError, ValueError, RecursionError) as error:
        raise Unfinished(f"{CONFIG} cannot be read ({error}).") from None
    if (how := how_it_stopped(summary)) is not None:
        if not stopped:
            raise Unfinished(why_left_out(summary))
        name = f"{name} ({how})"
    try:
        rows = logged(read_history(directory / METRICS), summary["steps"])
    except UNREADABLE as error:
        raise Unfinished(f"{METRICS} is damaged ({type(error).__name__}: {error}).") from None
    return Run(printable(name), str(directory), config, summary, **rows)


def _so_far(directory: Path) -> dict[str, Any]:
    """Returns the summary of a run that has written none, because it goes on or could not."""
    try:
        summary = last_logged(directory)
    except UNREADABLE as error:
        raise Unfinished(f"there is no {SUMMARY}, and {METRICS} is damaged ({type(error).__name__}).") from None
    running = is_in_use(directory)
    return summary | {"state": RUNNING if running else KILLED, "reason": "" if running else f"there is no {SUMMARY}"}


def _summary(directory: Path) -> dict[str, Any]:
    try:
        summary = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Unfinished(f"{SUMMARY} is no whole JSON ({error}).") from None
    if not isinstance(summary, dict) or "steps" not in summary:
        raise Unfinished(f"{SUMMARY} does not say how many steps it took.")
    return summary
