"""Reads the runs of a W&B group from the server, with the same configuration, summary and curves as on disk."""

from typing import Any

from tedlab.compare.runs import Run, flatten, how_it_stopped, logged, why_left_out
from tedlab.errors import UsageError
from tedlab.history import steps_done
from tedlab.launch.listing import KILLED
from tedlab.launch.outcome import FINISHED
from tedlab.renamed import nested

_STEP = "trainer/global_step"  # under which Lightning logs it to W&B
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

    try:
        found = list(wandb.Api().runs(project, filters={"group": group}, order="+created_at"))
        groups = [] if found else sorted({run.group for run in wandb.Api().runs(project) if run.group})
        summaries = {run.id: _summary(run) for run in found}
        chosen = [run for run in found if stopped or how_it_stopped(summaries[run.id]) is None]
        runs = [_read(run, name, summaries[run.id]) for run, name in zip(chosen, _names(chosen), strict=True)]
    except (wandb.errors.Error, ValueError) as error:
        raise UsageError(f"W&B could not be asked for {project}: {error}") from error
    notes = [f"{run.url} is left out: {why_left_out(summaries[run.id])}" for run in found if run not in chosen]
    if not runs:
        known = f" Its groups: {', '.join(groups)}." if groups else ""
        raise UsageError("\n".join([f"{project} has no finished run in group '{group}'.{known}", *notes]))
    return runs, notes


def _names(runs: list[Any]) -> list[str]:
    """Returns the runs' names, with their identifiers unless the names alone tell the runs apart."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [f"{run.name} ({run.id})" for run in runs]


def _summary(run: Any) -> dict[str, Any]:
    """Returns the summary that a run has written at its end; of one that has not, what it logged last."""
    summary = dict(run.summary_metrics)
    if "steps" in summary:
        return summary
    state = KILLED if run.state == FINISHED else run.state
    return summary | {"state": state, "steps": steps_done(summary, _STEP) if _STEP in summary else 0}


def _read(run: Any, name: str, summary: dict[str, Any]) -> Run:
    if (how := how_it_stopped(summary)) is not None:
        name = f"{name} ({how})"
    config = {key: value for key, value in run.config.items() if key not in _NO_SETTINGS}
    rows = ({**row, "step": steps_done(row, _STEP)} for row in run.scan_history() if row.get(_STEP) is not None)
    return Run(name, run.url, flatten(nested(config)), summary, **logged(rows, summary["steps"]))
