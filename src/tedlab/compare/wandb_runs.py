"""Reads the runs of a W&B group from the server, with the same configuration, summary and curves as on disk."""

from typing import Any

from tedlab.compare.runs import Run, curves, flatten, how_it_stopped, why_left_out
from tedlab.errors import UsageError
from tedlab.renamed import nested

_NO_SETTINGS = (
    "parameters",
    "layout",
    "certificate",
    "versions",
    "git_revision",
)  # results that tedlab.report adds to W&B's configuration


def read_group(project: str, group: str, stopped: bool = False) -> tuple[list[Run], list[str]]:
    """Reads the finished runs of a group.

    Args:
        project: ``entity/project``.
        group: Group of the runs.
        stopped: Whether to include runs that failed or were interrupted; their names then say so.

    Returns:
        The runs, oldest first, and a note for each run that is left out.

    Raises:
        UsageError: If the server cannot be reached, refuses, or has no finished run in this group.
    """
    import wandb

    try:
        found = list(wandb.Api().runs(project, filters={"group": group}, order="+created_at"))
        groups = [] if found else sorted({run.group for run in wandb.Api().runs(project) if run.group})
        complete = [run for run in found if _is_whole(run.summary_metrics, stopped)]
        runs = [_read(run, name) for run, name in zip(complete, _names(complete), strict=True)]
    except (wandb.errors.Error, ValueError) as error:
        raise UsageError(f"W&B could not be asked for {project}: {error}") from error
    notes = [f"{run.url} is left out: {_why(run)}" for run in found if run not in complete]
    if not runs:
        known = f" Its groups: {', '.join(groups)}." if groups else ""
        raise UsageError("\n".join([f"{project} has no finished run in group '{group}'.{known}", *notes]))
    return runs, notes


def _is_whole(summary: Any, stopped: bool) -> bool:
    return "steps" in summary and (stopped or how_it_stopped(summary) is None)


def _why(run: Any) -> str:
    if how_it_stopped(run.summary_metrics) is None:
        return f"it is {run.state} and has no summary."
    return why_left_out(run.summary_metrics)


def _names(runs: list[Any]) -> list[str]:
    """Returns the runs' names, with their identifiers unless the names alone tell the runs apart."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [f"{run.name} ({run.id})" for run in runs]


def _read(run: Any, name: str) -> Run:
    summary = run.summary_metrics
    if (how := how_it_stopped(summary)) is not None:
        name = f"{name} ({how})"
    config = {key: value for key, value in run.config.items() if key not in _NO_SETTINGS}
    rows = run.scan_history()
    return Run(name, run.url, flatten(nested(config)), summary, curves(rows, "trainer/global_step", summary["steps"]))
