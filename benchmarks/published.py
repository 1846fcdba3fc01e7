"""Predicts runs that others have published, and compares: ``python -m benchmarks.published``.

``published.yaml`` holds the runs, and each is predicted by the closed form of ``tedlab plan``. A row names the kind of
software that it ran on, its *profile*, which is chosen from what the source says. ``modern`` is what a cluster's file
says. The other profiles multiply the time of kernels by one constant each, which their calibrating rows set; these have
no part in the score, and nothing is fitted to any other row.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.paper import canvas, configured
from tedlab.config import Compiler, with_values
from tedlab.predict.cluster import load_cluster
from tedlab.predict.estimate import Estimate, estimate
from tedlab.predict.estimate.step import COMPUTE, OPTIMIZER
from tedlab.predict.flops import forward_flops
from tedlab.predict.spread import PUBLISHED, spread_of

HERE = Path(__file__).parent
RUNS = HERE / "published.yaml"
PICTURE = HERE.parent / "docs" / "published.png"
PROFILES = ("modern", "eager", "deepspeed")
UNITS = ("seconds", "samples_per_second", "tokens_per_second", "mfu")
ATTENTION = ("causal", "full")
COMMON = ("trainer=gpu", "trainer.precision=bf16-true", "model.sequence_length=4096", "optim.tile=1800000")
BAND = 0.15


@dataclass(frozen=True)
class Run:
    """A published run; ``published.yaml`` says what the fields mean."""

    name: str
    source: str
    cluster: str
    overrides: Sequence[str]
    result: Mapping[str, Any]
    profile: str
    assumed: str
    calibrates: bool = field(default=False)
    fused: bool = field(default=False)

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ValueError(f"{self.name}: profile {self.profile} is unknown; valid: {', '.join(PROFILES)}")
        units = [unit for unit in UNITS if unit in self.result]
        if len(units) != 1 or not set(self.result) <= {*units, "attention"}:
            raise ValueError(f"{self.name}: its result {dict(self.result)} must have one of {', '.join(UNITS)}")
        if (units == ["mfu"]) != (self.result.get("attention") in ATTENTION):
            raise ValueError(f"{self.name}: attention: {' or '.join(ATTENTION)} goes with mfu, and with nothing else")


@dataclass(frozen=True)
class Compared:
    """A run and what the closed form says of it.

    Attributes:
        run: The run.
        estimated: The estimate, on the cluster as its file says.
        published: Seconds of a step.
        predicted: The same, with the constant of the run's profile.
    """

    run: Run
    estimated: Estimate
    published: float
    predicted: float

    @property
    def ratio(self) -> float:
        """Predicted by published seconds."""
        return self.predicted / self.published


def read(path: Path = RUNS) -> list[Run]:
    """Reads runs.

    Raises:
        ValueError: If a row lacks a field, has one that there is not, or an invalid value.
    """
    needed = {f.name for f in fields(Run) if f.default is MISSING}
    known = {f.name for f in fields(Run)}
    runs = []
    for number, row in enumerate(yaml.safe_load(path.read_text()), 1):
        which = f"{path.name}, row {number} ({row.get('name', 'without a name')})"
        if missing := sorted(needed - set(row)):
            raise ValueError(f"{which} has no {', '.join(missing)}")
        if unknown := sorted(set(row) - known):
            raise ValueError(
                f"{which} has {', '.join(unknown)}, which no row has; there is: {', '.join(sorted(known))}"
            )
        runs.append(Run(**row))
    return runs


def compared(runs: Sequence[Run]) -> list[Compared]:
    """Predicts all runs, after the calibrating ones have set the constants of their profiles."""
    estimates = [estimated(run) for run in runs]
    constants = dict.fromkeys(PROFILES, 1.0)
    for profile in PROFILES:
        those = [found for run, found in zip(runs, estimates, strict=True) if run.profile == profile and run.calibrates]
        if those:
            constants[profile] = geometric_mean(factor(*found) for found in those)
    return [
        Compared(run, e, published, e.step_seconds + (constants[run.profile] - 1) * kernel_seconds(e))
        for run, (e, published) in zip(runs, estimates, strict=True)
    ]


def estimated(run: Run) -> tuple[Estimate, float]:
    """Returns the estimate of a run, and the seconds of a step that its source says."""
    config = configured([*COMMON, *run.overrides])
    if run.fused:  # whether tedlab could compile this layout or not
        config = with_values(config, {"model.compile": Compiler.INDUCTOR})
    found = estimate(config, load_cluster(run.cluster))
    (unit,) = (unit for unit in UNITS if unit in run.result)
    value, gpus = float(run.result[unit]), config.parallel.world_size
    if unit == "seconds":
        return found, value
    if unit == "samples_per_second":
        return found, config.data.batch_size / value
    if unit == "tokens_per_second":
        return found, found.tokens / gpus / value
    counted = found.flops
    if run.result["attention"] == "full":  # the closed form counts half of the scores
        counted += 3 * forward_flops(config.model, config.moe)["attention_scores"] * found.tokens / gpus
    return found, counted / (value * found.peak_flops)


def kernel_seconds(of: Estimate) -> float:
    """Seconds of all kernels, those of the optimizer included."""
    return of.seconds[COMPUTE] + of.seconds[OPTIMIZER]


def factor(of: Estimate, published: float) -> float:
    """By how much kernels must be slower for the estimate to be what was published."""
    kernels = kernel_seconds(of)
    return (published - (of.step_seconds - kernels)) / kernels


def score(rows: Sequence[Compared]) -> tuple[float, float]:
    """Median and largest error of the rows that calibrate nothing, as the share by which one time exceeds the other."""
    errors = [math.exp(abs(math.log(row.ratio))) - 1 for row in rows if not row.run.calibrates]
    return median(errors), max(errors)


def spread(rows: Sequence[Compared]) -> float:
    """The factor within which two of three rows are that calibrate nothing."""
    return spread_of(row.ratio for row in rows if not row.run.calibrates)


def lines(rows: Sequence[Compared]) -> list[tuple[str, ...]]:
    """The cells of the table."""
    return [
        (
            row.run.name,
            row.run.profile + (", calibrates" if row.run.calibrates else ""),
            f"{row.published:.3g}",
            f"{row.predicted:.3g}",
            f"{row.ratio:.2f}",
        )
        for row in rows
    ]


HEAD = ("run", "profile", "published, s", "predicted, s", "ratio")


def markdown(rows: Sequence[Compared]) -> str:
    """The table and the score, for the documentation."""
    rule = ["---", "---", *["---:"] * 3]
    table = "".join("| " + " | ".join(cells) + " |\n" for cells in (HEAD, rule, *lines(rows)))
    by_profile = {profile: [row for row in rows if row.run.profile == profile] for profile in PROFILES}
    scores = {profile: score(of) for profile, of in by_profile.items() if any(not row.run.calibrates for row in of)}
    said = ", ".join(f"{name} {100 * middle:.0f} % and {100 * worst:.0f} %" for name, (middle, worst) in scores.items())
    modern = PROFILES[0]
    return (
        f"{table}\nMedian and largest error of the rows that calibrate nothing: {said}.\n"
        f"Two of three {modern} runs are within a factor of {spread(by_profile[modern]):.2f}.\n"
    )


def draw(rows: Sequence[Compared], path: Path = PICTURE) -> None:
    """Predicted by published seconds of each run and its range, with the band of 15 %."""
    figure, (axes,) = canvas("Published runs: predicted by published seconds of a step", size=(9, 4.6))
    axes.axvspan(1 - BAND, 1 + BAND, color="0.92", label=f"± {BAND:.0%}", zorder=0)
    axes.axvline(1, color="0.6", linewidth=1, zorder=1)
    for (profile, calibrates), color in zip(_KINDS, _COLORS, strict=True):
        those = {n: row for n, row in enumerate(rows) if (row.run.profile, row.run.calibrates) == (profile, calibrates)}
        if not those:
            continue
        ratios = [row.ratio for row in those.values()]
        face = "white" if calibrates else color
        label = profile + (", calibrates" if calibrates else "")
        low, high = zip(*(PUBLISHED.range(ratio) for ratio in ratios), strict=True)
        axes.hlines([*those], low, high, color=color, linewidth=1, alpha=0.6, zorder=2)
        axes.scatter(ratios, [*those], s=50, edgecolors=color, facecolors=face, zorder=3, label=label)
    axes.set_yticks(range(len(rows)), [row.run.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    marks = (0.35, 0.5, 0.7, 0.85, 1, 1.15, 1.5, 2)
    axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.set_xlim(0.33, 2)
    axes.set_xlabel("predicted / published, and the range of the prediction: below 1, it is too fast")
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    figure.savefig(path)


_KINDS = [(profile, calibrates) for profile in PROFILES for calibrates in (False, True)]
_COLORS = ["C0", "C0", "C1", "C1", "C2", "C2"]


def main() -> None:
    """The command."""
    rows = compared(read())
    table = Table(*HEAD, box=SIMPLE_HEAD)
    for cells in lines(rows):
        table.add_row(*cells)
    console = Console()
    console.print(table)
    middle, worst = score(rows)
    console.print(f"median error {middle:.0%}, largest {worst:.0%}, of the rows that calibrate nothing")
    draw(rows)
    console.print(f"saved in {PICTURE.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
