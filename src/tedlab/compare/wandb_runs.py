"""Reads the runs of a W&B group from the server, with the same configuration, summary and curves as on disk."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tedlab.compare.runs import Run, Unfinished, checked, flatten, how_it_stopped, logged, why_left_out
from tedlab.errors import UsageError
from tedlab.history import UNREADABLE, steps_done
from tedlab.launch.listing import KILLED
from tedlab.launch.outcome import FINISHED
from tedlab.renamed import nested
from tedlab.untrusted import printable

T = TypeVar("T")

_STEP = "trainer/global_step"  # under which Lightning logs it to W&B
_HERE = "its summary at W&B"
_NOT_FINITE = {text: float(text) for text in ("NaN", "Infinity", "-Infinity")}  # texts there, since JSON has no such
_NO_SETTINGS = (
    "parameters",
    "layout",
    "certificate",
    "versions",
    "git_revision",
)  # results that tedlab.report adds to W&B's configuration


def read_group(project: str, group: str, stopped: bool = False) -> tuple[list[Run], list[str]]:
    """Reads the runs of a group.

    Args:
        project: ``entity/project``.
        group: Group of the runs.
        stopped: Whether to include runs that have not finished; their names then say so.

    Returns:
        The runs, oldest first, and a note for each run that is left out.

    Raises:
        UsageError: If the server cannot be reached, refuses, or has no finished run in this group.
    """
    import wandb

    notes: list[str] = []
    try:
        found = list(wandb.Api().runs(project, filters={"group": group}, order="+created_at"))
        groups = [] if found else sorted({run.group for run in wandb.Api().runs(project) if run.group})
        summaries = _made(found, lambda run: _summary(run, stopped), notes)
        chosen = [run for run in found if run.id in summaries]
        names = dict(zip(summaries, _names(chosen), strict=True))
        runs = [*_made(chosen, lambda run: _read(run, names[run.id], summaries[run.id]), notes).values()]
    except (wandb.errors.Error, ValueError) as error:
        raise UsageError(f"W&B could not be asked for {project}: {error}") from error
    if not runs:
        known = f" Its groups: {', '.join(map(printable, groups))}." if groups else ""
        raise UsageError("\n".join([f"{project} has no finished run in group '{group}'.{known}", *notes]))
    return runs, notes


def _made(runs: list[Any], make: Callable[[Any], T], notes: list[str]) -> dict[str, T]:
    """Returns what is made of each run, by its identifier; adds a note for each run of which nothing can be made."""
    made = {}
    for run in runs:
        try:
            made[run.id] = make(run)
        except Unfinished as reason:
            notes.append(printable(f"{run.url} is left out: {reason}"))
    return made


def _names(runs: list[Any]) -> list[str]:
    """Returns the runs' names, with their identifiers unless the names alone tell the runs apart."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [f"{run.name} ({run.id})" for run in runs]


def _summary(run: Any, stopped: bool) -> dict[str, Any]:
    """Returns the summary that a run has written at its end; of one that has not, what it logged last.

    Raises:
        Unfinished: If it is damaged, or if the run has not finished and those are not asked for.
    """
    summary = {
        key: _NOT_FINITE.get(value, value) if isinstance(value, str) else value
        for key, value in run.summary_metrics.items()
    }
    summary = {key: value for key, value in summary.items() if not (isinstance(value, Mapping) and "_type" in value)}
    if "steps" not in summary:
        state = KILLED if run.state == FINISHED else run.state
        try:
            summary |= {"state": state, "steps": steps_done(summary, _STEP) if _STEP in summary else 0}
        except UNREADABLE as error:
            raise Unfinished(f"{_HERE} is damaged ({_STEP}: {error}).") from None
    summary = checked(summary, _HERE)
    if not stopped and how_it_stopped(summary) is not None:
        raise Unfinished(why_left_out(summary))
    return summary


def _read(run: Any, name: str, summary: dict[str, Any]) -> Run:
    if (how := how_it_stopped(summary)) is not None:
        name = f"{name} ({how})"
    config = {key: value for key, value in run.config.items() if key not in _NO_SETTINGS}
    rows = [row for row in run.scan_history() if row.get(_STEP) is not None]
    try:
        curves = logged(({**row, "step": steps_done(row, _STEP)} for row in rows), summary["steps"])
    except UNREADABLE as error:
        raise Unfinished(f"its history at W&B is damaged ({type(error).__name__}: {error}).") from None
    return Run(printable(name), run.url, flatten(printable(nested(config))), summary, **curves)
