"""A plan: all layouts by the closed form, the most promising by simulation, in as many processes as there are cores."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tedlab.config import TrainConfig, with_values
from tedlab.errors import UsageError
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.plan.family import largest
from tedlab.predict.plan.search import (
    Candidate,
    Degrees,
    Found,
    layouts,
    pareto_front,
    search,
    slowest_rank,
    smallest,
)
from tedlab.validate import complete_simulated

_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What has been found for a configuration.

    Attributes:
        found: by the closed form.
        front: those of ``found`` that nothing beats in time, memory and traffic at once.
        simulated: the fastest of the front as the simulator sees them, fastest first; the winner is the first.
    """

    found: Found
    front: list[Candidate]
    simulated: list[Candidate]

    @property
    def winner(self) -> Candidate:
        """The fastest that fits."""
        return self.simulated[0]


def make_plan(
    config: TrainConfig,
    cluster: ClusterConfig,
    workers: Executor,
    *,
    reserve: float,
    simulations: int,
    fixed: Sequence[str] = (),
    progress: Callable[[str, int, int], None] = lambda doing, done, of: None,
) -> Plan:
    """The best layout of a job.

    Args:
        config: as composed, not yet completed.
        cluster: that the job runs on.
        workers: that search and simulate; those that simulate must be processes.
        reserve: bytes of a GPU that are left for what is not modelled.
        simulations: how many candidates are simulated.
        fixed: dotted names of settings that are kept as they are in ``config``.
        progress: told what is being done, and how much of how much is.

    Raises:
        UsageError: if nothing fits or nothing validates; says why, and what comes nearest.
    """
    slowest_rank(config.parallel.world_size, 1, cluster)  # raises if the cluster is too small
    capacity = cluster.memory_bytes - reserve
    found, pairs = Found(), layouts(config, fixed)
    try:
        running = [workers.submit(search, config, cluster, capacity, fixed, pair) for pair in pairs]
        for n, part in enumerate(as_completed(running), 1):
            found.add(part.result())
            progress("layouts", n, len(pairs))
    except ValueError as error:
        raise UsageError(str(error)) from None
    _check_found(found, capacity)
    front = pareto_front(found.fitting)
    simulated = _simulated(workers, config, cluster, capacity, front, simulations, progress)
    return Plan(found, front, simulated)


def largest_models(
    config: TrainConfig,
    cluster: ClusterConfig,
    workers: Executor,
    *,
    reserve: float,
    fixed: Sequence[str] = (),
    progress: Callable[[str, int, int], None] = lambda doing, done, of: None,
) -> dict[int, TrainConfig]:
    """By tensor degree: a copy of ``config`` whose base model is the largest of a GPT-3-like family that fits.

    Args: as of :func:`make_plan`.

    Raises:
        UsageError: if not even the smallest fits with any degree.
    """
    slowest_rank(config.parallel.world_size, 1, cluster)
    capacity = cluster.memory_bytes - reserve
    pairs: dict[int, list[Degrees]] = {}
    for pair in layouts(config, fixed):
        pairs.setdefault(pair.tensor, []).append(pair)
    running = {workers.submit(_largest, config, cluster, capacity, fixed, group): t for t, group in pairs.items()}
    models: dict[int, TrainConfig] = {}
    for n, part in enumerate(as_completed(running), 1):
        model = part.result()
        if model is not None:
            models[running[part]] = model
        progress("models", n, len(pairs))
    if not models:
        raise UsageError(
            f"Not even a model of 64 features fits in any layout of {config.parallel.world_size} GPUs with these "
            "settings: look at data.batch_size, moe.num_experts and what else is fixed"
        )
    return dict(sorted(models.items()))


def _largest(
    config: TrainConfig, cluster: ClusterConfig, capacity: float, fixed: Sequence[str], pairs: Sequence[Degrees]
) -> TrainConfig | None:
    def fits(candidate: TrainConfig) -> bool:
        peaks = (smallest(candidate, cluster, fixed, pair) for pair in reversed(pairs))
        return any(peak is not None and peak <= capacity for peak in peaks)

    return largest(config, pairs[0].tensor, fits)


def _check_found(found: Found, capacity: float) -> None:
    if found.fitting:
        return
    reasons = "".join(f"\n  {count} × {reason}" for reason, count in found.refused.most_common(8))
    if found.nearest is None:
        raise UsageError(f"No layout is possible:{reasons}")
    missing = (found.nearest.peak_bytes - capacity) / _GIB
    raise UsageError(
        f"Nothing fits: of {found.too_large} combinations that are possible the smallest needs "
        f"{found.nearest.peak_bytes / _GIB:.2f} GiB, {missing:.2f} GiB more than there are "
        f"({capacity / _GIB:.2f} GiB without the reserve):\n  {written(found.nearest)}\nIts fullest moment is the "
        f"{found.nearest.fullest}. Use more GPUs, or a smaller model (plan.largest=true finds the largest)."
        + (f"\nNot possible are:{reasons}" if reasons else "")
    )


def written(candidate: Candidate) -> str:
    """Its settings as overrides."""
    return " ".join(overrides(candidate))


def overrides(candidate: Candidate) -> list[str]:
    """Its settings, one override each."""
    return [f"{name}={str(v).lower() if isinstance(v, bool) else v}" for name, v in candidate.settings.items()]


def _simulated(
    workers: Executor,
    config: TrainConfig,
    cluster: ClusterConfig,
    capacity: float,
    front: Sequence[Candidate],
    simulations: int,
    progress: Callable[[str, int, int], None],
) -> list[Candidate]:
    """The first of the front, simulated; more of them if none of those fits after all."""
    fitting: list[Candidate] = []
    for start in range(0, len(front), simulations):
        chosen = front[start : start + simulations]
        progress("simulations", 0, len(chosen))
        running = [workers.submit(simulated, config, cluster, candidate) for candidate in chosen]
        for n, part in enumerate(as_completed(running), 1):
            if part.result().peak_bytes <= capacity:
                fitting.append(part.result())
            progress("simulations", n, len(chosen))
        if fitting:
            break
    if not fitting:
        raise UsageError(
            f"By the closed form {len(front)} candidates fit, by simulation none: they are at the limit of memory. "
            "Use more GPUs, a smaller model, or a smaller plan.reserve_gib"
        )
    return sorted(fitting, key=lambda candidate: candidate.costs)


def simulated(config: TrainConfig, cluster: ClusterConfig, candidate: Candidate) -> Candidate:
    """The candidate as the simulator sees it. The process must not be part of a process group."""
    from tedlab.predict.sim import simulate

    checked = complete_simulated(with_values(config, candidate.settings))
    result = simulate(checked, cluster, candidate.rank)
    held = result.memory.at_peak()
    faster = candidate.step_seconds / result.step_seconds
    return replace(
        candidate,
        step_seconds=result.step_seconds,
        tokens_per_second=candidate.tokens_per_second * faster,
        mfu=candidate.mfu * faster,
        peak_bytes=sum(held.values()),
        between_nodes_bytes=result.wire["between_nodes"],
    )


@contextmanager
def worker_processes() -> Iterator[Executor]:
    """A process for each core, forked from one that has imported everything and has no threads, unlike this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tedlab.predict.plan.plan", "tedlab.predict.sim"])
    executor = ProcessPoolExecutor(os.cpu_count(), context)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
