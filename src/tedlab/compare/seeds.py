"""Averages runs that differ in nothing but their seed, so that a comparison shows how much chance does."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from tedlab.compare.comparison import PLUMBING, how_evaluated, is_one_of, written
from tedlab.compare.runs import CURVES, Clock, Curve, Run
from tedlab.errors import UsageError

_SEED = "seed"
_NAMED = 4  # a mean of more runs is named after its first ones


def averaged(runs: Sequence[Run]) -> list[Run]:
    """Replaces runs that differ in nothing but their seed by their mean, whose ``members`` they are.

    Runs that took different numbers of steps are kept apart, and so are one that broke, and runs that were evaluated on
    other sets or otherwise.

    Returns:
        The means, and the runs that have no other to average with, in the order of their first members.

    Raises:
        UsageError: If there is nothing to average.
    """
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        settings = {key: written(value) for key, value in run.config.items() if not is_one_of(key, (*PLUMBING, _SEED))}
        ended = run.summary["steps"], run.summary.get("state")
        evaluated = sorted((name, written(how)) for name, how in how_evaluated(run).items())
        groups.setdefault((*ended, *sorted(settings.items()), *evaluated), []).append(run)
    if len(groups) == len(runs):
        raise UsageError("seeds=true: no two of these runs differ in nothing but their seed, evaluations included")
    return [_mean(group) if len(group) > 1 else group[0] for group in groups.values()]


def deviation(run: Run, name: str) -> float | None:
    """Returns the standard deviation of a summary's value over the members of a mean; None where there is none."""
    values = [value for member in run.members if (value := member.number(name)) is not None]
    whole = len(values) == len(run.members) and math.isfinite(sum(values))
    return stdev(values) if len(values) > 1 and whole else None


def band(run: Run, name: str) -> tuple[Curve, Curve]:
    """Returns the lowest and the highest value of a loss among the members of a mean, at the steps of its curve."""
    rows = list(_aligned([member.curves[name] for member in run.members]))
    return [(step, min(values)) for step, values in rows], [(step, max(values)) for step, values in rows]


def _mean(group: Sequence[Run]) -> Run:
    first = group[0]
    names = [run.name for run in group]
    shown = "+".join(names) if len(names) <= _NAMED else f"{'+'.join(names[: _NAMED - 1])}+… ({len(names)} runs)"
    config = dict(first.config)
    if _SEED in config:
        seeds = {written(run.config.get(_SEED)): run.config.get(_SEED) for run in group}
        config[_SEED] = [seeds[text] for text in sorted(seeds, key=lambda text: (len(text), text))]
    summary = {key: _mean_value([run.summary.get(key) for run in group]) for key in first.summary}
    curves = {
        name: [(step, _average(values)) for step, values in _aligned([run.curves[name] for run in group])]
        for name in CURVES
    }
    seconds = _mean_clock([run.seconds for run in group])
    sources = ", ".join(run.source for run in group)
    return Run(shown, sources, config, summary, curves, first.tokens, seconds, tuple(group))


def _mean_value(values: Sequence[Any]) -> Any:
    """Returns the mean of numbers, None if some runs lack one, and of what is no number the first run's."""
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in values]
    if not numbers[0] or all(value == values[0] for value in values):  # whole numbers stay whole
        return values[0]
    if not all(numbers):
        return None
    return _average(values)


def _average(values: Sequence[float]) -> float:
    """Returns the mean; NaN if it would not be finite."""
    return fmean(values) if math.isfinite(sum(values)) else math.nan


def _mean_clock(clocks: Sequence[Clock]) -> Mapping[int, float]:
    return {
        step: _average([clock[step] for clock in clocks])
        for step in clocks[0]
        if all(step in clock for clock in clocks)
    }


def _aligned(curves: Sequence[Curve]) -> Iterator[tuple[int, list[float]]]:
    """Yields each step that all curves have, and their values there."""
    values = [dict(curve) for curve in curves]
    for step, _ in curves[0]:
        if all(step in others for others in values):
            yield step, [others[step] for others in values]
