"""Corrects a cluster's constants by runs that were measured on it, and says by how much predictions were off.

Kernels and collectives get a factor each, so that predictions come closest to the steps of all runs, in relative
errors. One run alone, or runs that share their time alike between the two, give both the same factor. What a file
says of the host and of waits stays as it is: it is measured by itself, and counts on top.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import torch
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from tedlab.compare.runs import CONFIG, Run, how_it_stopped, read_runs
from tedlab.config import DataConfig, TrainConfig, with_values
from tedlab.errors import UsageError
from tedlab.predict.cluster import ClusterConfig, Slower
from tedlab.predict.estimate import estimate
from tedlab.predict.estimate.step import COMPUTE, OPTIMIZER
from tedlab.predict.sim.meter import KERNELS, MATRICES
from tedlab.predict.spread import Spread, spread_of, spread_on
from tedlab.progress import Advance
from tedlab.renamed import nested
from tedlab.tables import FittingTable
from tedlab.untrusted import flat, one_line, read_yaml, typed
from tedlab.validate import complete_simulated

_SHORTEST, _LONGEST = 1e-6, 1e7  # seconds that a step may take
_OPTIMIZERS = {f"torch.optim.{name}" for name in torch.optim.__all__}
_OPTIMIZERS |= {f"tedlab.optim.{name}" for name in ("Muon", "NarrowAdamW")}
_TELLING = (OSError, ValueError, OmegaConfBaseException, UsageError)  # their messages say what is wrong
_DAMAGED = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)  # a configuration is no run's
_ENOUGH = 3  # runs to say how far from them predictions are
_ALIKE = 0.07  # smallest ratio of singular values of two factors told apart: below, noise grows more than tenfold
_FAR = 2.0  # ratio of the two factors from which on they are doubtful
_ROUNDS = 12  # of correcting at most: how long the host and waits hold a step up depends on the factors
_SETTLED = 1e-3  # relative change of factors that ends it


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

    @property
    def spread(self) -> Spread:
        """How far predictions for the cluster may be off, and that runs say so, if enough do."""
        if len(self.seen) < _ENOUGH:
            return spread_on(self.cluster)
        return replace(spread_on(self.cluster), source=f"how far each of {len(self.seen)} runs is from the others")

    def table(self) -> Table:
        """Returns a table of what was measured and predicted."""
        table = FittingTable(title="measured steps")
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


def learn(cluster: ClusterConfig, paths: Sequence[str], advance: Advance = lambda share: None) -> Learned:
    """Corrects a cluster by the runs in directories of runs or sweeps.

    Args:
        cluster: The cluster.
        paths: The directories.
        advance: Takes the share of the predictions that each one is, if all rounds of corrections are needed.

    Raises:
        UsageError: If a path has no run, or none was measured and can be estimated; the message says why.
    """
    runs, notes = read_runs([Path(path) for path in paths], stopped=True)
    known: list[tuple[Run, float, TrainConfig, tuple[float, float, float]]] = []
    each = 1 / (1 + _ROUNDS) / max(1, len(runs))

    def predicted_of(config: TrainConfig, cluster: ClusterConfig) -> tuple[float, float, float]:
        parts = _parts(config, cluster)
        advance(each)
        return parts

    for run in runs:
        try:
            seconds = _measured(run)
            config = _config(run, cluster)
            parts = predicted_of(config, cluster)
        except _TELLING as error:
            notes.append(f"{run.source} is left out: {one_line(error)}")
        except _DAMAGED as error:
            notes.append(f"{run.source} is left out: its {CONFIG} is no run's ({type(error).__name__}: {error})")
        else:
            notes += _other_device(run, config, cluster)
            known.append((run, seconds, config, parts))
    notes = [flat(note) for note in notes]  # what they quote may come from others
    if not known:
        raise UsageError("\n".join(["plan.from has no run whose steps were measured.", *notes]))
    measured = np.array([seconds for _, seconds, _, _ in known])
    predicted = np.array([parts for _, _, _, parts in known])
    factors, now = np.ones(2), predicted
    for _ in range(_ROUNDS):
        before, alone = factors, now[:, :2] / factors
        factors = factors_of(alone, measured, now[:, 2])
        slower = Slower(*(float(f) * old for f, old in zip(factors, asdict(cluster.slower).values(), strict=True)))
        corrected = replace(cluster, slower=slower)
        now = np.array([predicted_of(config, corrected) for _, _, config, _ in known])
        if np.allclose(factors, before, rtol=_SETTLED):
            break
    seen = [
        Seen(run.name, seconds, float(parts.sum()), float(better.sum()))
        for (run, seconds, _, _), parts, better in zip(known, predicted, now, strict=True)
    ]
    for one, held_up in zip(seen, now[:, 2], strict=True):
        if held_up >= one.measured:
            notes.append(
                f"{flat(one.name)}: the host and waits alone, which no factor corrects, are predicted to take "
                f"{held_up:.4g} s, and the step took {one.measured:.4g}; calibrate again"
            )
    if max(factors) > _FAR * min(factors):
        notes.append(
            f"kernels are corrected by {factors[0]:.3g}, collectives by {factors[1]:.3g}: so far apart they may stand "
            "for something else that runs differ in; measure runs that communicate more, and less, than these"
        )
    spread = spread_of(left_out(alone, measured, now[:, 2])) if len(seen) >= _ENOUGH else cluster.spread
    return Learned(replace(corrected, spread=spread), seen, notes)


def factors_of(parts: np.ndarray, measured: np.ndarray, fixed: np.ndarray | float = 0.0) -> np.ndarray:
    """Returns by how much to multiply kernels and collectives.

    Args:
        parts: Predicted seconds of kernels and of collectives, (runs, 2).
        measured: Measured seconds, (runs,).
        fixed: Predicted seconds that no factor multiplies, (runs,).
    """
    relative, rest = parts / measured[:, None], 1 - fixed / measured
    whole = relative.sum(1)
    if (rest > 0).all():
        one = np.exp((np.log(rest) - np.log(whole)).mean())
    else:  # what is fixed takes longer than a run took: the other runs decide, or none
        one = whole @ rest / (whole @ whole) if whole @ rest > 0 else 1.0
    together = np.full(2, one)
    singular = np.linalg.svd(relative, compute_uv=False)
    if len(measured) < 2 or singular[-1] < _ALIKE * singular[0]:
        return together
    apart = np.linalg.lstsq(relative, rest, rcond=None)[0]
    return apart if (apart > 0).all() else together


def left_out(parts: np.ndarray, measured: np.ndarray, fixed: np.ndarray | float = 0.0) -> list[float]:
    """Returns of each run predicted by measured seconds, with the factors that all other runs give.

    The arguments are those of :func:`factors_of`, for two runs or more.
    """
    fixed = np.broadcast_to(fixed, measured.shape)
    ratios = []
    for number in range(len(measured)):
        factors = factors_of(*(np.delete(each, number, 0) for each in (parts, measured, fixed)))
        ratios.append(float((parts[number] @ factors + fixed[number]) / measured[number]))
    return ratios


def _parts(config: TrainConfig, cluster: ClusterConfig) -> tuple[float, float, float]:
    """Returns the predicted seconds of a step's kernels, of its collectives, and of the host and waits.

    The closed form knows no host and no waits. Where the cluster has any, the step is simulated, as a plan's winner is.
    """
    if not cluster.has_clock:
        found = estimate(config, cluster)
        kernels = found.seconds[COMPUTE] + found.seconds[OPTIMIZER]
        return kernels, found.step_seconds - kernels, 0.0
    from tedlab.predict.sim import simulate

    simulation = simulate(config, cluster)
    alone = simulation.alone_on(cluster)
    kernels = sum(taken for (_, cause), taken in alone.items() if cause in (MATRICES, KERNELS))
    collectives = sum(alone.values()) - kernels - sum(simulation.hidden.values())
    return kernels, collectives, simulation.step_seconds - kernels - collectives


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
    """Returns a run's configuration, completed, without what would be imported: the run may come from others."""
    config = typed(TrainConfig, nested(read_yaml(Path(run.source) / CONFIG)) | {"logger": {}, "callbacks": {}})
    config = with_values(config, {"data.module": DataConfig.module})
    options = dict(config.optim.optimizer)
    target = options.pop("_target_", None)
    if target not in _OPTIMIZERS or any(name.startswith("_") or not _plain(it) for name, it in options.items()):
        raise ValueError(f"its optimizer ({flat(target)}) is none of torch.optim or tedlab.optim with plain options")
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
