"""Degrees of parallelism: how many processes there are and how they divide, the same for every process."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal

from tedlab.config import Order, ParallelConfig

GroupKind = Literal[
    "tensor",
    "data",
    "expert",
    "expert_data",
    "expert_tensor",
    "world",
    # Parts of an expert group that is on several nodes: its processes on one node, and one process of each node.
    "expert_in_node",
    "expert_between_nodes",
]


@dataclass(frozen=True)
class ParallelDegrees:
    """How many processes there are, how they divide, and who is in a group with whom. Nothing else computes with ranks.

    The same processes are arranged twice: dense layers divide them by data × tensor, experts by expert_data × expert ×
    expert_tensor. Where ``expert_tensor`` is not ``tensor``, the layout is *folded*: tensor groups of dense layers and
    those of experts are then different processes. The tensor index varies fastest; ``order`` says which index of
    experts follows.

    Args:
        world_size: The number of processes (G).
        tensor: The size of a tensor-parallel group of dense layers (T).
        expert: The size of an expert-parallel group (E_p).
        sequence: Whether activations between layers are divided over the tensor group by position.
        expert_tensor: The number of processes that divide each expert (T_e); None: ``tensor``.
        order: Which processes are neighbours: those of an expert group (``expert``), or the replicas of an expert
            (``expert_data``).

    Raises:
        ValueError: If tensor, or expert_tensor × expert, does not divide the world size; the message says which degrees
            would.
    """

    world_size: int
    tensor: int = 1
    expert: int = 1
    sequence: bool = False
    expert_tensor: int = None  # type: ignore[assignment]  # an int in every instance
    order: str = Order.EXPERT.value

    def __post_init__(self) -> None:
        if self.expert_tensor is None:
            object.__setattr__(self, "expert_tensor", self.tensor)
        for name in ("world_size", "tensor", "expert", "expert_tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a degree is a whole number of at least 1")
        if self.folded and self.world_size % self.tensor:
            raise ValueError(
                f"tensor = {self.tensor} does not divide the world size {self.world_size}. With {self.world_size} "
                f"processes, tensor can be {_listed(_divisors(self.world_size))}"
            )
        if self.world_size % (self.expert_tensor * self.expert):
            raise ValueError(self._too_many())

    def _too_many(self) -> str:
        name, block = "expert_tensor" if self.folded else "tensor", self.expert_tensor * self.expert
        larger = -(-self.world_size // block) * block
        while larger % self.tensor:
            larger += block
        fitting = _listed(f"{t}×{e}" for t, e in _fitting(self.world_size))
        return (
            f"{name} × expert = {self.expert_tensor}×{self.expert} = {block} does not divide the world size "
            f"{self.world_size}. Either use a multiple of {block} processes ({larger}, for instance), or, with "
            f"{self.world_size}, one of these {name}×expert: {fitting}"
        )

    @property
    def folded(self) -> bool:
        """Whether experts are divided by width over other processes than dense layers are."""
        return self.expert_tensor != self.tensor

    @property
    def data(self) -> int:
        """The number of data ranks, which see different tokens (D = G / T)."""
        return self.world_size // self.tensor

    @property
    def expert_data(self) -> int:
        """The number of replicas of each expert (D_e = G / (E_p · T_e))."""
        return self.world_size // (self.expert * self.expert_tensor)

    @property
    def replicas_together(self) -> int:
        """How many of the ``expert_data`` replicas wait for each other in every layer: tensor groups connect them."""
        together = {0}
        while True:
            ranks = [rank for rank in range(self.world_size) if self.coordinates(rank)["expert_data"] in together]
            groups = {rank // self.tensor for rank in ranks}
            reached = {self.coordinates(g * self.tensor + t)["expert_data"] for g in groups for t in range(self.tensor)}
            if reached == together:
                return len(together)
            together = reached

    @property
    def sizes(self) -> dict[GroupKind, int]:
        """The number of processes in a group of each kind."""
        return {kind: size for kind, (size, _) in self._places.items()}

    @property
    def _places(self) -> dict[GroupKind, tuple[int, int]]:
        """Of each kind, the size of a group and the distance between the ranks of neighbours."""
        block = self.expert_tensor * self.expert
        expert, expert_data = self.expert_tensor, block
        if self.order == Order.EXPERT_DATA:
            expert, expert_data = self.expert_tensor * self.expert_data, self.expert_tensor
        return {
            "tensor": (self.tensor, 1),
            "data": (self.data, self.tensor),
            "expert": (self.expert, expert),
            "expert_data": (self.expert_data, expert_data),
            "expert_tensor": (self.expert_tensor, 1),
            "world": (self.world_size, 1),
        }

    def coordinates(self, rank: int) -> dict[GroupKind, int]:
        """Returns a process's place in its group of each kind."""
        return {kind: rank // stride % size for kind, (size, stride) in self._places.items()}

    def groups(self, rank: int, nodes: int = 1) -> dict[GroupKind, range]:
        """Returns the global ranks of a rank's groups, in the order of their places.

        :class:`tedlab.topology.Topology` holds the process groups themselves.

        Args:
            rank: The global rank.
            nodes: If more than 1, an expert group is also divided into groups inside each of so many nodes, and between
                them.
        """
        places, found = dict(self._places), {}
        if nodes > 1:
            expert, stride = places["expert"]
            places["expert_in_node"] = expert // nodes, stride
            places["expert_between_nodes"] = nodes, expert // nodes * stride
        for kind, (size, stride) in places.items():
            first = rank - rank // stride % size * stride
            found[kind] = range(first, first + size * stride, stride)
        return found

    def nodes(self, ranks_per_node: int) -> int:
        """Returns over how many nodes of so many consecutive ranks each expert group is divided.

        Raises:
            ValueError: If these numbers, or those of a group's processes on its nodes, are not all the same.
        """
        return _nodes(self, ranks_per_node)

    @property
    def in_step(self) -> GroupKind:
        """The kind of group whose processes take part in each other's forward passes, beside tensor ranks.

        Folded, groups of several kinds overlap, so that all processes do.
        """
        return "world" if self.folded else "expert"

    def senders(self, rank: int) -> list[range]:
        """Returns who sends tokens to the experts of a process: for each process that divides these, a group."""
        return [self.groups(member)["expert"] for member in self.groups(rank)["expert_tensor"]]

    def described(self) -> dict[str, Any]:
        """Returns all degrees by name, with those that follow from others."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**given, "data": self.data, "expert_data": self.expert_data}

    def __str__(self) -> str:
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        experts = f"expert_tensor {self.expert_tensor} × " if self.folded else ""
        between = "; " if self.folded else " × "
        beside = "" if self.order == Order.EXPERT else ", replicas of experts side by side"
        return (
            f"{processes}: tensor {self.tensor}{between}{experts}expert {self.expert} × "
            f"expert_data {self.expert_data} (data {self.data}){', sequence-sharded' if self.sequence else ''}{beside}"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _fitting(world_size: int) -> Iterator[tuple[int, int]]:
    divisors = _divisors(world_size)
    return ((t, e) for t in divisors for e in divisors if world_size % (t * e) == 0)


def _listed(options: Iterable[object]) -> str:
    return ", ".join(map(str, options))


@cache
def _nodes(degrees: ParallelDegrees, ranks_per_node: int) -> int:
    groups = dict.fromkeys(degrees.groups(rank)["expert"] for rank in range(degrees.world_size))
    on_nodes = {tuple(Counter(rank // ranks_per_node for rank in group).values()): group for group in groups}
    if len({(len(counts), count) for counts in on_nodes for count in counts}) > 1:
        counts, group = max(on_nodes.items(), key=lambda item: max(item[0]) - min(item[0]))
        others = "" if len(on_nodes) == 1 else ", and others lie differently"
        raise ValueError(
            "expert groups must have equally many processes on each of their nodes, but with "
            f"{ranks_per_node} ranks per node the group of ranks {', '.join(map(str, group))} has "
            f"{' and '.join(map(str, counts))}{others}"
        )
    return len(next(iter(on_nodes)))


def check_divides(name: str, value: int, by: str, degree: int) -> None:
    """Refuses a degree that does not divide a size.

    Raises:
        ValueError: If it does not; the message lists the degrees up to 64 that do.
    """
    if value % degree:
        fitting = ", ".join(str(n) for n in range(1, min(value, 64) + 1) if value % n == 0)
        raise ValueError(
            f"{name} ({value}) is not divisible by {by} ({degree}). With this {name}, {by} can be {fitting}"
        )


def parallel_degrees(config: ParallelConfig) -> ParallelDegrees:
    """Returns the degrees of a configuration, and raises the errors of :class:`ParallelDegrees`."""
    expert_tensor = config.tensor if config.expert_tensor is None else config.expert_tensor
    return ParallelDegrees(
        config.world_size, config.tensor, config.expert, config.sequence, expert_tensor, config.order
    )
