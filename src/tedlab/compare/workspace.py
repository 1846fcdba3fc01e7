"""Saves a view of a W&B group with the charts of the report."""

from typing import Any

from tedlab.compare.comparison import Comparison
from tedlab.compare.runs import CURVES
from tedlab.compare.traffic import PHASES
from tedlab.errors import UsageError


def save_workspace(comparison: Comparison, project: str, group: str) -> None:
    """Saves the view in the project; W&B prints its address.

    Args:
        comparison: Comparison of the group's runs.
        project: ``entity/project``.
        group: Group of the runs that the view shows.

    Raises:
        UsageError: If ``wandb-workspaces`` is not installed, or the server rejects the view.
    """
    try:
        from wandb_workspaces import workspaces
    except ImportError as error:
        raise UsageError("workspace=true needs wandb-workspaces: pip install 'tedlab[wandb]'") from error
    import wandb

    entity, name = project.split("/")
    view = workspaces.Workspace(
        entity=entity,
        project=name,
        name=f"tedlab compare: {group}",
        sections=_sections(comparison),
        runset_settings=workspaces.RunsetSettings(
            filters=[workspaces.Metric("Group") == group],
            order=[workspaces.Ordering(workspaces.Metric("CreatedTimestamp"), ascending=True)],
            pinned_columns=[f"config:{key}" for key in comparison.settings],
        ),
    )
    try:
        view.save()
    except (wandb.errors.Error, ValueError) as error:
        raise UsageError(f"W&B did not take the view for {project}: {error}") from error


def _sections(comparison: Comparison) -> list[Any]:
    """Makes the charts of the report that W&B can draw: curves, and bars of totals over all steps."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports.v2 import BarPlot, LinePlot

    keys: list[Any] = sorted({key for run in comparison.runs for key in run.summary})
    losses = [LinePlot(title=name, x="trainer/global_step", y=[name], title_x="step") for name in CURVES]
    sent = [
        BarPlot(title=f"{phase}: bytes sent in all steps", metrics=metrics)
        for phase in PHASES
        if (metrics := [key for key in keys if key.startswith(f"comm/{phase}/") and key.endswith("/wire_bytes")])
    ]
    times = [BarPlot(title="time of a step, s", metrics=["perf/step_time_s"])]
    for ending, title in (("/seconds", "time in collectives"), ("/emulated_seconds", "delays of an emulated network")):
        timed = [key for key in keys if key.startswith("comm/") and key.endswith(ending)]
        times += [BarPlot(title=f"{title}, s in all steps", metrics=timed)] if timed else []
    memory = [BarPlot(title="peak memory, bytes", metrics=["memory/peak_bytes"])]
    panels: dict[str, list[Any]] = {"Losses": losses, "Communication": sent, "Time": times, "Memory": memory}
    return [workspaces.Section(name, panels=drawn, is_open=True) for name, drawn in panels.items() if drawn]
