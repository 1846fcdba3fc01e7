"""Searches for a layout: estimates every combination that validates, and selects those that are worth a simulation.

Nothing here prints or simulates.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

from tedlab.config import Order, Slicing, TrainConfig, value_of, with_values
from tedlab.degrees import parallel_degrees
from tedlab.errors import UsageError
from tedlab.optim.fused import TILE
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
# Where parallel.sequence stays false or moe.slice is given, positions are divided around experts alone.
_SLICED: Settings = {**_DUPLICATES[0], "moe.slice": Slicing.TOKENS.value}
_TILES: tuple[Settings, ...] = ({"optim.tile": TILE}, {"optim.tile": "fused"})
TOGGLES = {name for group in (_CHECKPOINTING, (_SLICED,), _TILES) for name in group[0]}
DEGREES = {"parallel.tensor", "parallel.expert", "parallel.expert_tensor"}
ORDER = "parallel.order"
CHOSEN = DEGREES | {ORDER, "data.micro_batch_size"} | TOGGLES  # what a search chooses


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

    @property
    def folded(self) -> bool:
        """Whether experts are divided by width over other processes than dense layers are."""
        width = self.settings.get("parallel.expert_tensor")
        return width not in (None, self.settings["parallel.tensor"])


@dataclass
class Found:
    """What a search has found.

    Attributes:
        fitting: The candidates that fit.
        refused: How many combinations do not validate, by reason.
        too_large: How many combinations do not fit in memory.
        nearest: The smallest of those that do not fit.
        tensors: The tensor degrees of layouts that are possible.
        slower: How many layouts were left out, because even with unlimited memory another is faster.
    """

    fitting: list[Candidate] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    too_large: int = 0
    nearest: Candidate | None = None
    tensors: set[int] = field(default_factory=set)
    slower: int = 0

    def add(self, other: "Found") -> None:
        """Adds what another part of the search has found."""
        self.fitting += other.fitting
        self.refused += other.refused
        self.too_large += other.too_large
        self.tensors |= other.tensors
        self.slower += other.slower
        if other.nearest is not None:
            self.miss(other.nearest)

    def miss(self, candidate: Candidate) -> None:
        """Keeps the candidate if it is the smallest so far that does not fit."""
        if self.nearest is None or candidate.peak_bytes < self.nearest.peak_bytes:
            self.nearest = candidate

    @property
    def fastest(self) -> float:
        """The predicted seconds of the fastest candidate that fits; infinite if there is none."""
        return min((candidate.step_seconds for candidate in self.fitting), default=math.inf)


class Degrees(NamedTuple):
    """The degrees of a layout; an ``expert_tensor`` of None is ``tensor``."""

    tensor: int
    expert: int
    expert_tensor: int | None = None

    @property
    def width(self) -> int:
        """The number of processes that divide each expert."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def folded(self) -> bool:
        """Whether experts are divided by width over other processes than dense layers are."""
        return self.width != self.tensor

    @property
    def settings(self) -> Settings:
        """The settings that give these degrees."""
        settings: Settings = {"parallel.tensor": self.tensor, "parallel.expert": self.expert}
        return settings | ({} if self.expert_tensor is None else {"parallel.expert_tensor": self.expert_tensor})


def layouts(config: TrainConfig, fixed: Sequence[str]) -> list[Degrees]:
    """Returns the degrees of every layout that is not folded, or is as ``parallel.expert_tensor`` says.

    The products of degrees divide the world, and expert degrees the experts. Settings named in ``fixed`` keep their
    value, whether that is possible or not.
    """
    world, experts = config.parallel.world_size, config.moe.num_experts
    tensors = [config.parallel.tensor] if "parallel.tensor" in fixed else _divisors(world)
    degrees = [config.parallel.expert] if "parallel.expert" in fixed else _divisors(experts or 1)
    width = config.parallel.expert_tensor if "parallel.expert_tensor" in fixed else None
    found = [Degrees(*pair, width) for pair in product(tensors, degrees)]
    return [one for one in found if world % one.tensor == 0 == world % (one.width * one.expert)] or found


def foldings(config: TrainConfig, fixed: Sequence[str], tensors: Collection[int], most: int) -> list[Degrees]:
    """Returns the degrees of every folded layout; none if the model is dense or ``parallel.expert_tensor`` is fixed.

    Args:
        config: The configuration as composed, not yet completed.
        fixed: The dotted names of settings that keep their value in ``config``.
        tensors: The tensor degrees.
        most: The most processes that divide an expert, unless they divide dense layers, too.
    """
    world, moe = config.parallel.world_size, config.moe
    if not moe.num_experts or "parallel.expert_tensor" in fixed:
        return []
    degrees = [config.parallel.expert] if "parallel.expert" in fixed else _divisors(moe.num_experts)
    widths = [n for n in _divisors(world) if (moe.ffn or config.model.ffn) % n == 0]
    return [
        Degrees(tensor, expert, width)
        for tensor, expert, width in product(sorted(tensors), degrees, widths)
        if width != tensor and width <= max(tensor, most) and world % (width * expert) == 0
    ]


def search(
    config: TrainConfig,
    cluster: ClusterConfig,
    capacity: float,
    fixed: Sequence[str],
    degrees: Degrees,
    beat: float = math.inf,
) -> Found:
    """Estimates all combinations with the same degrees.

    Args:
        config: The configuration as composed, not yet completed.
        cluster: The cluster that the job runs on.
        capacity: The bytes of a GPU that may be used.
        fixed: The dotted names of settings that keep their value in ``config``.
        degrees: The degrees of the layout.
        beat: The seconds of a step below which a layout is worth a search. It is left out if its largest micro-batch
            without recomputation takes longer, whether or not that fits.

    Raises:
        ValueError: See :func:`tedlab.predict.estimate.estimate`.
    """
    found = Found()
    layout = degrees.settings
    try:
        smallest = 1 if "data.micro_batch_size" not in fixed else config.data.micro_batch_size
        _check_degrees(with_values(config, layout | {"data.micro_batch_size": smallest}), degrees, fixed)
        rank = slowest_rank(config.parallel.world_size, degrees.tensor, cluster, degrees.width)
    except UsageError as error:
        found.refused[_reason(error)] += 1
        return found
    found.tensors.add(degrees.tensor)
    micro_batches = _micro_batches(config, degrees, fixed)
    if beat < math.inf:
        quickest = _quickest(config, cluster, fixed, degrees, micro_batches[-1], rank)
        if quickest is not None and quickest >= beat:
            found.slower = 1
            return found
    for toggles in _toggles(config, degrees, fixed):
        for n, size in enumerate(micro_batches):
            settings = layout | {"data.micro_batch_size": size} | toggles
            try:
                checked = complete_simulated(with_values(config, settings), cluster)
            except UsageError as error:
                found.refused[_reason(error)] += len(micro_batches) - n
                break
            slot = _best_slot(checked, cluster, rank)
            candidate = evaluated(with_values(checked, slot), cluster, settings | slot, rank)
            if candidate.peak_bytes > capacity:
                # A larger micro-batch may still fit: if it is the only one of a step, no sum of gradients is kept.
                found.too_large += 1
                found.miss(candidate)
            else:
                found.fitting.append(candidate)
    return found


def _check_degrees(config: TrainConfig, degrees: Degrees, fixed: Sequence[str]) -> None:
    """Raises what is wrong with the first combination of toggles if all are refused."""
    refused: UsageError | None = None
    for toggles in _toggles(config, degrees, fixed):
        try:
            check_simulated(with_values(config, toggles))
            return
        except UsageError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _quickest(
    config: TrainConfig, cluster: ClusterConfig, fixed: Sequence[str], degrees: Degrees, size: int, rank: int
) -> float | None:
    """Returns the fewest seconds of a step with this micro-batch size and as little recomputation as may be.

    None if no combination of toggles validates.
    """
    seconds, first = [], None
    for toggles in _toggles(config, degrees, fixed):
        alike = [toggles[name] for name in ("model.recompute.granularity", "comm.cac", "optim.tile")]
        if first not in (None, alike):
            continue
        settings = degrees.settings | {"data.micro_batch_size": size} | toggles
        try:
            checked = complete_simulated(with_values(config, settings), cluster)
        except UsageError:
            continue
        first = alike
        checked = with_values(checked, _best_slot(checked, cluster, rank))
        seconds.append(evaluated(checked, cluster, settings, rank).step_seconds)
    return min(seconds, default=None)


def _best_slot(checked: TrainConfig, cluster: ClusterConfig, rank: int) -> Settings:
    """Returns the ``comm.shortcut_slot`` that hides most; nothing if it is given, or experts run beside nothing."""
    if not checked.comm.overlap_shortcut or checked.comm.shortcut_slot is not None:
        return {}
    slot = Hiding(ClosedForm(checked), cluster, rank).best_slot()
    return {} if slot is None else {"comm.shortcut_slot": slot}


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


def reordered(config: TrainConfig, cluster: ClusterConfig, candidate: Candidate) -> Candidate | None:
    """Returns a candidate in which others are neighbours: replicas of an expert, or else the processes of its group.

    Groups are then on other links, and nothing else changes. None if an expert has no replicas or each process has all
    experts, so that there is one order, or if the layout does not validate in the other.
    """
    other = Order.EXPERT if config.parallel.order == Order.EXPERT_DATA else Order.EXPERT_DATA
    settings = candidate.settings | {ORDER: other.value}
    try:
        checked = complete_simulated(with_values(config, settings), cluster)
    except UsageError:
        return None
    degrees = parallel_degrees(checked.parallel)
    if degrees.expert == 1 or degrees.expert_data == 1:
        return None
    return evaluated(checked, cluster, settings, candidate.rank)


def slowest_rank(world: int, tensor: int, cluster: ClusterConfig, expert_tensor: int = 1) -> int:
    """Returns the first rank whose tensor group spans several nodes, else whose expert_tensor group does, or 0.

    Raises:
        UsageError: If the cluster has fewer GPUs than the world needs.
    """
    try:
        collective_seconds("all_reduce", 0, range(world), cluster)
    except ValueError as error:
        raise UsageError(str(error)) from None
    for size in (tensor, expert_tensor):
        for first in range(0, min(world, size * cluster.gpus_per_node), size):
            if link_of(range(first, first + size), cluster.gpus_per_node) == "between_nodes":
                return first
    return 0


def _toggles(config: TrainConfig, degrees: Degrees, fixed: Sequence[str]) -> Iterator[Settings]:
    """Yields the combinations of toggles that have an effect in this layout, with fixed ones at their value."""
    several = degrees.tensor > 1
    communicates = several or degrees.expert > 1 or degrees.folded
    checkpointing = [c for c in _CHECKPOINTING if communicates or not c["comm.cac"]]
    checkpointing = [c for c in checkpointing if several or c["comm.cac"] != "shard"]
    duplicates = _DUPLICATES if config.moe.num_experts else (_DUPLICATES[0], _DUPLICATES[-1])
    kept = {name: value_of(config, name) for name in TOGGLES.intersection(fixed)}
    if degrees.folded and several:
        # Tokens are dealt whatever comm.dtd says; whole experts gather nothing, so there is nothing to fuse.
        dealt = _DUPLICATES[1 if degrees.width == 1 else 2]
        duplicates = {**dealt, "comm.dtd": kept.get("comm.dtd", True)}, _DUPLICATES[-1]
    if config.moe.num_experts and kept.get("moe.slice") == Slicing.TOKENS:
        duplicates = (_SLICED,)
    elif config.moe.num_experts and kept.get("parallel.sequence") is False:
        duplicates += (_SLICED,)
    if degrees.folded:  # where fusing may be asked for anyway
        fused = {name: kept[name] for name in kept if name == "comm.fuse_reduce_scatter"}
        duplicates = tuple(choice | fused for choice in duplicates)
    adam = str(config.optim.optimizer["_target_"]).endswith(("Adam", "AdamW"))
    tiles = _TILES[degrees.folded :] if adam else _TILES[:1]  # fused takes less time and memory
    choices = checkpointing, duplicates if several else duplicates[:1], tiles
    seen: list[Settings] = []
    for parts in product(*(_agreeing(choice, kept) for choice in choices)):
        settings = {name: value for part in parts for name, value in part.items()} | kept
        if settings not in seen:
            seen.append(settings)
            yield settings


def _agreeing(choices: Sequence[Settings], kept: Settings) -> Sequence[Settings]:
    """Returns the choices that have the kept values; if none has, all, whose values the kept ones then replace."""
    return [one for one in choices if all(kept.get(name, value) == value for name, value in one.items())] or choices


def smallest(config: TrainConfig, cluster: ClusterConfig, fixed: Sequence[str], degrees: Degrees) -> int | None:
    """Returns the peak bytes of the leanest combination with one pair of degrees, or None if none validates."""
    peaks = []
    for toggles in ({"parallel.sequence": False}, {"parallel.sequence": True, "comm.dtd": False}):
        lean = {"data.micro_batch_size": 1, "model.recompute.granularity": "block", "comm.cac": False, **toggles}
        settings = degrees.settings
        settings |= {name: value for name, value in lean.items() if name not in fixed}
        try:
            checked = complete_simulated(with_values(config, settings), cluster)
        except UsageError:
            continue
        peaks.append(evaluated(checked, cluster, settings, 0).peak_bytes)
    return min(peaks, default=None)


def _micro_batches(config: TrainConfig, degrees: Degrees, fixed: Sequence[str]) -> list[int]:
    """Returns the powers of two that divide a data rank's samples, or the fixed size alone."""
    if "data.micro_batch_size" in fixed:
        return [config.data.micro_batch_size]
    samples = config.data.batch_size // (config.parallel.world_size // degrees.tensor)
    return [1 << n for n in range(samples.bit_length()) if samples % (1 << n) == 0]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _reason(error: UsageError) -> str:
    return str(error).partition(". ")[0]
