"""Searches for a layout: estimates every combination that validates, and selects those that are worth a simulation.

Nothing here prints or simulates.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

from tedlab.config import TrainConfig, value_of, with_values
from tedlab.degrees import ParallelDegrees
from tedlab.errors import UsageError
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.cost import collective_seconds, link_of
from tedlab.predict.estimate import estimate
from tedlab.predict.estimate.hiding import Hiding
from tedlab.predict.volumes import ClosedForm
from tedlab.validate import check_simulated, complete_simulated

Settings = dict[str, Any]  # by dotted name

_CHECKPOINTING: tuple[Settings, ...] = (
    {"model.recompute.granularity": "none", "comm.cac": False},
    {"model.recompute.granularity": "block", "comm.cac": False},
    {"model.recompute.granularity": "block", "comm.cac": "shard"},
    {"model.recompute.granularity": "block", "comm.cac": True},
)
_DUPLICATES: tuple[Settings, ...] = (
    {"comm.dtd": False, "comm.fuse_reduce_scatter": False, "parallel.sequence": False},
    {"comm.dtd": True, "comm.fuse_reduce_scatter": False, "parallel.sequence": False},
    {"comm.dtd": True, "comm.fuse_reduce_scatter": True, "parallel.sequence": False},
    {"comm.dtd": False, "comm.fuse_reduce_scatter": False, "parallel.sequence": True},
)
_TILES: tuple[Settings, ...] = ({"optim.tile": 1_800_000}, {"optim.tile": "fused"})
TOGGLES = {name for group in (_CHECKPOINTING, _DUPLICATES, _TILES) for name in group[0]}
CHOSEN = {"parallel.tensor", "parallel.expert", "data.micro_batch_size"} | TOGGLES  # what a search chooses


@dataclass(frozen=True)
class Candidate:
    """A layout with its toggles, and what it costs.

    Attributes:
        settings: The settings that define it.
        rank: The rank that the job waits for.
        step_seconds, tokens_per_second, mfu: The predicted speed.
        peak_bytes: The peak of the rank's memory.
        between_nodes_bytes: The bytes that the rank sends to other nodes in a step.
        fullest: The name of the moment of the peak.
    """

    settings: Settings
    rank: int
    step_seconds: float
    tokens_per_second: float
    mfu: float
    peak_bytes: int
    between_nodes_bytes: float
    fullest: str

    @property
    def costs(self) -> tuple[float, float, float]:
        """The step's seconds, peak bytes and bytes between nodes, all of which should be small."""
        return self.step_seconds, self.peak_bytes, self.between_nodes_bytes


@dataclass
class Found:
    """What a search has found.

    Attributes:
        fitting: The candidates that fit.
        refused: How many combinations do not validate, by reason.
        too_large: How many combinations do not fit in memory.
        nearest: The smallest of those that do not fit.
    """

    fitting: list[Candidate] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    too_large: int = 0
    nearest: Candidate | None = None

    def add(self, other: "Found") -> None:
        """Adds what another part of the search has found."""
        self.fitting += other.fitting
        self.refused += other.refused
        self.too_large += other.too_large
        if other.nearest is not None:
            self.miss(other.nearest)

    def miss(self, candidate: Candidate) -> None:
        """Keeps the candidate if it is the smallest so far that does not fit."""
        if self.nearest is None or candidate.peak_bytes < self.nearest.peak_bytes:
            self.nearest = candidate


class Degrees(NamedTuple):
    """The degrees of a layout."""

    tensor: int
    expert: int


def layouts(config: TrainConfig, fixed: Sequence[str]) -> list[Degrees]:
    """Returns every pair of degrees whose product divides the world and whose expert degree divides the experts.

    Settings named in ``fixed`` keep their value, whether that is possible or not.
    """
    world, experts = config.parallel.world_size, config.moe.num_experts
    tensors = [config.parallel.tensor] if "parallel.tensor" in fixed else _divisors(world)
    degrees = [config.parallel.expert] if "parallel.expert" in fixed else _divisors(experts or 1)
    pairs = [Degrees(*pair) for pair in product(tensors, degrees)]
    return [pair for pair in pairs if world % (pair.tensor * pair.expert) == 0] or pairs


def search(
    config: TrainConfig, cluster: ClusterConfig, capacity: float, fixed: Sequence[str], degrees: Degrees
) -> Found:
    """Estimates all combinations with one pair of degrees.

    Args:
        config: The configuration as composed, not yet completed.
        cluster: The cluster that the job runs on.
        capacity: The bytes of a GPU that may be used.
        fixed: The dotted names of settings that keep their value in ``config``.
        degrees: The degrees of the layout.

    Raises:
        ValueError: See :func:`tedlab.predict.estimate.estimate`.
    """
    found = Found()
    layout: Settings = {"parallel.tensor": degrees.tensor, "parallel.expert": degrees.expert}
    try:
        smallest = 1 if "data.micro_batch_size" not in fixed else config.data.micro_batch_size
        check_simulated(with_values(config, layout | {"data.micro_batch_size": smallest, **_plain(config, fixed)}))
        rank = slowest_rank(config.parallel.world_size, degrees.tensor, cluster)
    except UsageError as error:
        found.refused[_reason(error)] += 1
        return found
    micro_batches = _micro_batches(config, degrees, fixed)
    for toggles in _toggles(config, degrees, fixed):
        for n, size in enumerate(micro_batches):
            settings = layout | {"data.micro_batch_size": size} | toggles
            try:
                checked = complete_simulated(with_values(config, settings), cluster)
            except UsageError as error:
                found.refused[_reason(error)] += len(micro_batches) - n
                break
            if config.comm.overlap_shortcut and config.comm.shortcut_slot is None:
                slot = Hiding(ClosedForm(checked), cluster, rank).best_slot()
                if slot is not None:
                    settings = settings | {"comm.shortcut_slot": slot}
                    checked = with_values(checked, {"comm.shortcut_slot": slot})
            candidate = evaluated(checked, cluster, settings, rank)
            if candidate.peak_bytes > capacity:
                # A larger micro-batch may still fit: if it is the only one of a step, no sum of gradients is kept.
                found.too_large += 1
                found.miss(candidate)
            else:
                found.fitting.append(candidate)
    return found


def evaluated(checked: TrainConfig, cluster: ClusterConfig, settings: Settings, rank: int) -> Candidate:
    """Estimates a candidate in closed form; ``checked`` is its completed configuration."""
    result = estimate(checked, cluster, rank)
    return Candidate(
        settings,
        rank,
        result.step_seconds,
        result.tokens_per_second,
        result.mfu,
        result.memory.total,
        result.wire["between_nodes"],
        result.memory.name,
    )


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns, fastest first, those that no other equals or beats in time, memory and traffic between nodes at once."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: c.costs):
        if not any(all(a <= b for a, b in zip(other.costs, candidate.costs, strict=True)) for other in front):
            front.append(candidate)
    return front


def slowest_rank(world: int, tensor: int, cluster: ClusterConfig) -> int:
    """Returns the first rank whose tensor group spans several nodes, or 0 if none does.

    Raises:
        UsageError: If the cluster has fewer GPUs than the world needs.
    """
    try:
        collective_seconds("all_reduce", 0, range(world), cluster)
    except ValueError as error:
        raise UsageError(str(error)) from None
    for first in range(0, min(world, tensor * cluster.gpus_per_node), tensor):
        if link_of(range(first, first + tensor), cluster.gpus_per_node) == "between_nodes":
            return first
    return 0


def _toggles(config: TrainConfig, degrees: Degrees, fixed: Sequence[str]) -> Iterator[Settings]:
    """Yields the combinations of toggles that have an effect in this layout, with fixed ones at their value."""
    several = degrees.tensor > 1
    communicates = several or degrees.expert > 1
    checkpointing = [c for c in _CHECKPOINTING if communicates or not c["comm.cac"]]
    checkpointing = [c for c in checkpointing if several or c["comm.cac"] != "shard"]
    duplicates = _DUPLICATES if config.moe.num_experts else (_DUPLICATES[0], _DUPLICATES[-1])
    adam = str(config.optim.optimizer["_target_"]).endswith(("Adam", "AdamW"))
    tiles = _TILES if adam else _TILES[:1]
    kept = {name: value_of(config, name) for name in TOGGLES.intersection(fixed)}
    seen: list[Settings] = []
    for parts in product(checkpointing, duplicates if several else duplicates[:1], tiles):
        settings = {name: value for part in parts for name, value in part.items()} | kept
        if settings not in seen:
            seen.append(settings)
            yield settings


def smallest(config: TrainConfig, cluster: ClusterConfig, fixed: Sequence[str], degrees: Degrees) -> int | None:
    """Returns the peak bytes of the leanest combination with one pair of degrees, or None if none validates."""
    peaks = []
    for toggles in ({"parallel.sequence": False}, {"parallel.sequence": True, "comm.dtd": False}):
        lean = {"data.micro_batch_size": 1, "model.recompute.granularity": "block", "comm.cac": False, **toggles}
        settings: Settings = {"parallel.tensor": degrees.tensor, "parallel.expert": degrees.expert}
        settings |= {name: value for name, value in lean.items() if name not in fixed}
        try:
            checked = complete_simulated(with_values(config, settings), cluster)
        except UsageError:
            continue
        peaks.append(evaluated(checked, cluster, settings, 0).peak_bytes)
    return min(peaks, default=None)


def _plain(config: TrainConfig, fixed: Sequence[str]) -> Settings:
    """Returns settings without toggles, except fixed ones, which show whether the degrees alone are possible."""
    plain = _CHECKPOINTING[0] | _DUPLICATES[0]
    return {name: value_of(config, name) if name in fixed else value for name, value in plain.items()}


def _micro_batches(config: TrainConfig, degrees: Degrees, fixed: Sequence[str]) -> list[int]:
    """Returns the powers of two that divide a data rank's samples, or the fixed size alone."""
    if "data.micro_batch_size" in fixed:
        return [config.data.micro_batch_size]
    samples = config.data.batch_size // ParallelDegrees(config.parallel.world_size, *degrees).data
    return [1 << n for n in range(samples.bit_length()) if samples % (1 << n) == 0]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _reason(error: UsageError) -> str:
    return str(error).partition(". ")[0]
