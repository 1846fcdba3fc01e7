"""Corrects a cluster's constants by runs that were measured on it, and says by how much predictions were off.

Kernels and collectives get a factor each, so that the closed form comes closest to the steps of all runs, in relative
errors. One run alone, or runs that share their time alike between the two, give both the same factor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import torch
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from tedlab.compare.runs import CONFIG, Run, how_it_stopped, read_runs
from tedlab.config import TrainConfig
from tedlab.errors import UsageError
from tedlab.predict.cluster import ClusterConfig, Slower
from tedlab.predict.estimate import Estimate, estimate
from tedlab.predict.estimate.step import COMPUTE, OPTIMIZER
from tedlab.predict.spread import spread_of
from tedlab.renamed import nested
from tedlab.untrusted import flat, one_line, read_yaml, typed
from tedlab.validate import complete_simulated

_SHORTEST, _LONGEST = 1e-6, 1e7  # seconds that a step may take
_OPTIMIZERS = {f"torch.optim.{name}" for name in torch.optim.__all__}
_TELLING = (OSError, ValueError, OmegaConfBaseException, UsageError)  # their messages say what is wrong
_DAMAGED = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)  # a configuration is no run's
_ENOUGH = 3  # runs to say how far from them predictions are
_ALIKE = 1e-2  # smallest ratio of singular values of two factors that runs tell apart


@dataclass(frozen=True)
class Seen:
    """A run: seconds of a step that were measured, predicted, and predicted after the correction."""

    name: str
    measured: float
    predicted: float
    corrected: float


@dataclass(frozen=True)
class Learned:
    """What runs teach about a cluster.

    Attributes:
        cluster: The cluster with corrected constants.
        seen: The runs.
        notes: What was left out, and what is doubtful.
    """

    cluster: ClusterConfig
    seen: Sequence[Seen]
    notes: Sequence[str]

    def table(self) -> Table:
        """Returns a table of what was measured and predicted."""
        table = Table(title="measured steps", title_justify="left")
        table.add_column("run")
        for heading in ("measured, s", "predicted, s", "off by", "corrected, s", "off by"):
            table.add_column(heading, justify="right")
        for run in self.seen:
            of_run = [f"{run.measured:.4g}"]
            for seconds in (run.predicted, run.corrected):
                of_run += [f"{seconds:.4g}", f"{seconds / run.measured - 1:+.0%}"]
            table.add_row(run.name, *of_run)
        return table

    def verdict(self) -> str:
        """Says what was corrected."""
        ours = self.cluster.slower
        off = geometric_mean(run.predicted / run.measured for run in self.seen)
        return (
            f"Predictions were {off:.2f} × what {len(self.seen)} run{'s' * (len(self.seen) > 1)} took. Corrected, in a "
            f"cluster's file slower: {{kernels: {ours.kernels:.4g}, collectives: {ours.collectives:.4g}}}"
        )


def learn(cluster: ClusterConfig, paths: Sequence[str]) -> Learned:
    """Corrects a cluster by the runs in directories of runs or sweeps.

    Raises:
        UsageError: If a path has no run, or none was measured and can be estimated; the message says why.
    """
    runs, notes = read_runs([Path(path) for path in paths], stopped=True)
    known: list[tuple[Run, float, Estimate]] = []
    for run in runs:
        try:
            seconds = _measured(run)
            config = _config(run, cluster)
            found = estimate(config, cluster)
        except _TELLING as error:
            notes.append(f"{run.source} is left out: {one_line(error)}")
        except _DAMAGED as error:
            notes.append(f"{run.source} is left out: its {CONFIG} is no run's ({type(error).__name__}: {error})")
        else:
            notes += _other_device(run, config, cluster)
            known.append((run, seconds, found))
    notes = [flat(note) for note in notes]  # what they quote may come from others
    if not known:
        raise UsageError("\n".join(["plan.from has no run whose steps were measured.", *notes]))
    parts = np.array([[_kernels(found), found.step_seconds - _kernels(found)] for _, _, found in known])
    measured = np.array([seconds for _, seconds, _ in known])
    factors = factors_of(parts, measured)
    corrected = parts @ factors
    seen = [
        Seen(run.name, seconds, found.step_seconds, float(now))
        for (run, seconds, found), now in zip(known, corrected, strict=True)
    ]
    before = cluster.slower
    slower = Slower(float(factors[0]) * before.kernels, float(factors[1]) * before.collectives)
    spread = spread_of(left_out(parts, measured)) if len(seen) >= _ENOUGH else cluster.spread
    return Learned(replace(cluster, slower=slower, spread=spread), seen, notes)


def factors_of(parts: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Returns by how much to multiply kernels and collectives.

    Args:
        parts: Predicted seconds of kernels and of collectives, (runs, 2).
        measured: Measured seconds, (runs,).
    """
    relative = parts / measured[:, None]
    together = np.full(2, np.exp(-np.log(relative.sum(1)).mean()))
    singular = np.linalg.svd(relative, compute_uv=False)
    if len(measured) < 2 or singular[-1] < _ALIKE * singular[0]:
        return together
    apart = np.linalg.lstsq(relative, np.ones(len(measured)), rcond=None)[0]
    return apart if (apart > 0).all() else together


def left_out(parts: np.ndarray, measured: np.ndarray) -> list[float]:
    """Returns of each run predicted by measured seconds, with the factors that all other runs give.

    The arguments are those of :func:`factors_of`, for two runs or more.
    """
    ratios = []
    for number in range(len(measured)):
        factors = factors_of(np.delete(parts, number, 0), np.delete(measured, number))
        ratios.append(float(parts[number] @ factors / measured[number]))
    return ratios


def _kernels(found: Estimate) -> float:
    return found.seconds[COMPUTE] + found.seconds[OPTIMIZER]


def _measured(run: Run) -> float:
    """Returns the seconds of a step that were measured in a run."""
    if (how := how_it_stopped(run.summary)) is not None:
        raise ValueError(f"it {how} ({flat(run.summary.get('reason'))})")
    if run.emulated is not None:
        raise ValueError(f"its times are those of {run.emulated}, and were not measured")
    seconds = run.number("perf/step_time_s")
    if seconds is None:
        raise ValueError("it was too short to measure a step (summary.json has no perf/step_time_s)")
    if not _SHORTEST <= seconds <= _LONGEST:
        raise ValueError(f"summary.json is damaged: perf/step_time_s is {seconds:g}, and no step takes that")
    return seconds


def _config(run: Run, cluster: ClusterConfig) -> TrainConfig:
    """Returns a run's configuration, completed, without what Hydra would construct: the run may come from others."""
    config = typed(TrainConfig, nested(read_yaml(Path(run.source) / CONFIG)) | {"logger": {}, "callbacks": {}})
    options = dict(config.optim.optimizer)
    target = options.pop("_target_", None)
    if target not in _OPTIMIZERS or any(name.startswith("_") or not _plain(it) for name, it in options.items()):
        raise ValueError(f"its optimizer ({flat(target)}) is none of torch.optim with plain options")
    return complete_simulated(config, cluster)


def _plain(option: Any) -> bool:
    values = option if isinstance(option, list) else [option]
    return all(value is None or isinstance(value, str | int | float) for value in values)


def _other_device(run: Run, config: TrainConfig, cluster: ClusterConfig) -> list[str]:
    name = run.summary.get("device")
    on_cpu = config.trainer["accelerator"] == "cpu"
    known = isinstance(name, str) and cluster.device is not None
    if on_cpu != cluster.of_gpus and (not known or str(name).startswith(str(cluster.device))):
        return []
    ours = cluster.device or ("GPUs" if cluster.of_gpus else "CPUs")
    return [f"{run.source} was measured on another device ({name or 'a CPU'}) than the cluster's ({ours})"]
