"""Makes a plan: estimates all layouts in closed form and simulates the most promising, in one process per core."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tedlab.config import TrainConfig, with_values
from tedlab.errors import UsageError
from tedlab.interrupts import fork_server
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.plan.family import largest
from tedlab.predict.plan.search import (
    ORDER,
    Candidate,
    Degrees,
    Found,
    foldings,
    layouts,
    pareto_front,
    reordered,
    search,
    slowest_rank,
    smallest,
)
from tedlab.validate import complete_simulated

_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """The layouts found for a configuration.

    Attributes:
        found: What the search found by the closed form.
        front: The fitting candidates that no other equals or beats in time, memory and traffic at once.
        simulated: The fastest of the front with the simulator's results, fastest first; the winner is the first. If
            that is folded, the fastest layout that is not is among them, if there is one.
    """

    found: Found
    front: list[Candidate]
    simulated: list[Candidate]

    @property
    def winner(self) -> Candidate:
        """The fastest candidate that fits."""
        return self.simulated[0]

    @property
    def unfolded(self) -> Candidate | None:
        """The fastest that was simulated of those that are not folded."""
        return next((candidate for candidate in self.simulated if not candidate.folded), None)


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
    """Finds the best layout of a job.

    Args:
        config: The configuration as composed, not yet completed.
        cluster: The cluster that the job runs on.
        workers: The executor that searches and simulates; simulations need processes, not threads.
        reserve: The bytes of a GPU that are left for what is not modelled.
        simulations: How many candidates to simulate.
        fixed: The dotted names of settings that keep their value in ``config``.
        progress: Called with the present activity, and how many of how many of its parts are done.

    Raises:
        UsageError: If nothing fits or nothing validates; the message says why, and what comes nearest.
    """
    slowest_rank(config.parallel.world_size, 1, cluster)  # raises if the cluster is too small
    capacity = cluster.memory_bytes - reserve
    found = Found()

    def look(doing: str, among: Sequence[Degrees], beat: float) -> None:
        running = [workers.submit(search, config, cluster, capacity, fixed, one, beat) for one in among]
        for n, part in enumerate(as_completed(running), 1):
            found.add(part.result())
            progress(doing, n, len(among))

    try:
        look("layouts", layouts(config, fixed), math.inf)
        look("folded layouts", foldings(config, fixed, found.tensors, cluster.gpus_per_node), found.fastest)
    except ValueError as error:
        raise UsageError(str(error)) from None
    _check_found(found, capacity)
    front = pareto_front(found.fitting)
    if ORDER not in fixed:
        others = [other for one in front if (other := reordered(config, cluster, one)) is not None]
        front = pareto_front([*found.fitting, *others])
        found.fitting += [other for other in others if other in front]
    simulated = _simulated(workers, config, cluster, capacity, front, simulations, progress)
    if not simulated:
        raise UsageError(
            f"By the closed form {len(front)} candidates fit, by simulation none: they are at the limit of memory. "
            "Use more GPUs, a smaller model, or a smaller plan.reserve_gib"
        )
    if all(candidate.folded for candidate in simulated):  # what that gains is to be a difference of simulations
        others = pareto_front([candidate for candidate in found.fitting if not candidate.folded])
        simulated += _simulated(workers, config, cluster, capacity, others, 1, progress)
    return Plan(found, front, sorted(simulated, key=lambda candidate: candidate.costs))


def largest_models(
    config: TrainConfig,
    cluster: ClusterConfig,
    workers: Executor,
    *,
    reserve: float,
    fixed: Sequence[str] = (),
    progress: Callable[[str, int, int], None] = lambda doing, done, of: None,
) -> dict[int, TrainConfig]:
    """Returns, by tensor degree, a copy of ``config`` with the largest base model of a GPT-3-like family that fits.

    Of folded layouts, for each number of processes that divide an expert, it looks at the one with the most expert
    ranks, in which a process holds the least. The arguments are those of :func:`make_plan`.

    Raises:
        UsageError: If not even the smallest model fits with any degree, or blocks with experts are listed one by one.
    """
    if config.moe.blocks is not None:
        raise UsageError(
            f"plan.largest=true chooses the number of layers, for which moe.blocks={config.moe.blocks} cannot say "
            "which have experts; use moe.every and moe.first_dense"
        )
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
    tensor = pairs[0].tensor

    def fits(candidate: TrainConfig) -> bool:
        folded = foldings(candidate, fixed, [tensor], cluster.gpus_per_node)
        densest = {one.width: one for one in sorted(folded, key=lambda one: one.expert)}
        peaks = (smallest(candidate, cluster, fixed, one) for one in (*reversed(pairs), *densest.values()))
        return any(peak is not None and peak <= capacity for peak in peaks)

    return largest(config, tensor, fits)


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
    """Returns the candidate's settings as overrides on one line."""
    return " ".join(overrides(candidate))


def overrides(candidate: Candidate) -> list[str]:
    """Returns the candidate's settings, one override each."""
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
    """Simulates the first candidates of the front, and further ones as long as none fits; returns those that do."""
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
    return fitting


def simulated(config: TrainConfig, cluster: ClusterConfig, candidate: Candidate) -> Candidate:
    """Returns the candidate with the simulator's results. The process must not be part of a process group."""
    from tedlab.predict.sim import simulate

    checked = complete_simulated(with_values(config, candidate.settings), cluster)
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
    """Provides a process per core, forked from one that, unlike this one, has no threads and has all imports done."""
    executor = ProcessPoolExecutor(os.cpu_count(), fork_server(["tedlab.predict.plan.plan", "tedlab.predict.sim"]))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
