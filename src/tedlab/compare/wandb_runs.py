"""The runs of a W&B group, read from the server: the same configuration, summary and curves as in run directories."""

from typing import Any

from tedlab.cli import UsageError
from tedlab.compare.runs import Run, curves, flatten

_NO_SETTINGS = ("parameters", "layout", "certificate")  # results that tedlab.report adds to W&B's configuration


def read_group(project: str, group: str) -> tuple[list[Run], list[str]]:
    """The finished runs of a group, oldest first, and a note for each that has not finished.

    Args:
        project: ``entity/project``.
        group: of the runs.

    Raises:
        UsageError: if the server cannot be asked, or has no finished run in this group.
    """
    import wandb

    try:
        found = list(wandb.Api().runs(project, filters={"group": group}, order="+created_at"))
        groups = [] if found else sorted({run.group for run in wandb.Api().runs(project) if run.group})
        complete = [run for run in found if "steps" in run.summary_metrics]
        runs = [_read(run, name) for run, name in zip(complete, _names(complete), strict=True)]
    except (wandb.errors.Error, ValueError) as error:
        raise UsageError(f"W&B could not be asked for {project}: {error}") from error
    notes = [f"{run.url} is left out: it is {run.state} and has no summary." for run in found if run not in complete]
    if not runs:
        known = f" Its groups: {', '.join(groups)}." if groups else ""
        raise UsageError("\n".join([f"{project} has no finished run in group '{group}'.{known}", *notes]))
    return runs, notes


def _names(runs: list[Any]) -> list[str]:
    """Names that people gave, where they tell the runs apart; identifiers otherwise."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [f"{run.name} ({run.id})" for run in runs]


def _read(run: Any, name: str) -> Run:
    summary = run.summary_metrics
    config = {key: value for key, value in run.config.items() if key not in _NO_SETTINGS}
    rows = run.scan_history()
    return Run(name, run.url, flatten(config), summary, curves(rows, "trainer/global_step", summary["steps"]))
