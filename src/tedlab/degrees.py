"""Degrees of parallelism: how many processes there are and how they divide, the same for every process."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tedlab.config import ParallelConfig

GroupKind = Literal["tensor", "data", "expert", "expert_data", "expert_tensor", "world"]


@dataclass(frozen=True)
class ParallelDegrees:
    """How many processes there are and how they divide.

    Args:
        world_size: The number of processes.
        tensor: The size of a tensor-parallel group (T).
        expert: The size of an expert-parallel group (E_p).
        sequence: Whether activations between layers are divided over the tensor group by position.

    Raises:
        ValueError: If tensor × expert does not divide the world size; the message says which degrees would.
    """

    world_size: int
    tensor: int = 1
    expert: int = 1
    sequence: bool = False

    def __post_init__(self) -> None:
        for name in ("world_size", "tensor", "expert"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a degree is a whole number of at least 1")
        if self.world_size % (self.tensor * self.expert):
            block = self.tensor * self.expert
            larger = -(-self.world_size // block) * block
            fitting = ", ".join(f"{t}×{e}" for t, e in self._fitting(self.world_size))
            raise ValueError(
                f"tensor × expert = {self.tensor}×{self.expert} = {block} does not divide the world size "
                f"{self.world_size}. Either use a multiple of {block} processes ({larger}, for instance), or, with "
                f"{self.world_size}, one of these tensor×expert: {fitting}"
            )

    @staticmethod
    def _fitting(world_size: int) -> Iterator[tuple[int, int]]:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        return ((t, e) for t in divisors for e in divisors if world_size % (t * e) == 0)

    @property
    def data(self) -> int:
        """The number of data ranks, which see different tokens (D)."""
        return self.world_size // self.tensor

    @property
    def expert_data(self) -> int:
        """The number of replicas of each expert (D_e = D / E_p)."""
        return self.data // self.expert

    def groups(self, rank: int) -> dict[GroupKind, range]:
        """Returns the global ranks of a rank's groups; tensor varies fastest, then expert, then expert_data.

        :class:`tedlab.topology.Topology` holds the process groups themselves.
        """
        block = self.tensor * self.expert
        tensor = range(rank - rank % self.tensor, rank - rank % self.tensor + self.tensor)
        first_expert = rank - rank % block + rank % self.tensor
        return {
            "tensor": tensor,
            "data": range(rank % self.tensor, self.world_size, self.tensor),
            "expert": range(first_expert, first_expert + block, self.tensor),
            "expert_data": range(rank % block, self.world_size, block),
            "expert_tensor": tensor,
            "world": range(self.world_size),
        }

    @property
    def sizes(self) -> dict[GroupKind, int]:
        """The number of processes in a group of each kind."""
        return {kind: len(ranks) for kind, ranks in self.groups(0).items()}

    def __str__(self) -> str:
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        return (
            f"{processes}: tensor {self.tensor} × expert {self.expert} × "
            f"expert_data {self.expert_data} (data {self.data}){', sequence-sharded' if self.sequence else ''}"
        )


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
    return ParallelDegrees(config.world_size, config.tensor, config.expert, config.sequence)
