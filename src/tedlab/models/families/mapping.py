"""How parts of one model become parts of another and back: each rule states both directions at once.

A rule makes one of our parameters, or one expert's matrix of it, from one or several of their tensors. All that it does
is to move numbers about, so it maps gradients and optimizer state just as it maps weights, and its inverse is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """Makes one tensor of several, and takes it apart again."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Returns our tensor."""

    def split(self, ours: Tensor) -> list[Tensor]:
        """Returns their tensors, in the order of :meth:`join`'s."""


@dataclass(frozen=True)
class Same:
    """Their tensor is ours."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        (one,) = theirs
        return one

    def split(self, ours: Tensor) -> list[Tensor]:
        return [ours]


@dataclass(frozen=True)
class Transposed:
    """Their (out, in) is our (in, out): experts multiply from the other side."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        (one,) = theirs
        return one.mT

    def split(self, ours: Tensor) -> list[Tensor]:
        return [ours.mT]


@dataclass(frozen=True)
class AsRow:
    """Their (N,) is our (1, N)."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        (one,) = theirs
        return one.unsqueeze(0)

    def split(self, ours: Tensor) -> list[Tensor]:
        return [ours.squeeze(0)]


@dataclass(frozen=True)
class Alternated:
    """Their gate (F, …) and linear part (F, …) are our (2·F, …), feature by feature: gate 0, linear 0, gate 1, …"""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        gate, linear = theirs
        return torch.stack((gate, linear), 1).flatten(0, 1)

    def split(self, ours: Tensor) -> list[Tensor]:
        return list(ours.unflatten(0, (-1, 2)).unbind(1))


@dataclass(frozen=True)
class ByHead:
    """Their tensors are each ordered by head; ours has, head by head, the rows of all of them.

    For queries, keys and values, heads are those of keys, each with all queries that belong to it.

    Attributes:
        heads: Number of heads.
        rows: Rows of a head in each of their tensors.
    """

    heads: int
    rows: tuple[int, ...]

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        return torch.cat([one.unflatten(0, (self.heads, -1)) for one in theirs], 1).flatten(0, 1)

    def split(self, ours: Tensor) -> list[Tensor]:
        return [one.flatten(0, 1) for one in ours.unflatten(0, (self.heads, -1)).split(self.rows, 1)]


@dataclass(frozen=True)
class Stacked:
    """Their tensors are ours one below the other."""

    rows: tuple[int, ...]

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(theirs))

    def split(self, ours: Tensor) -> list[Tensor]:
        return list(ours.split(self.rows))


@dataclass(frozen=True)
class PairsApart:
    """Rotary pairs, neighbours with them (0 with 1, 2 with 3, …), are half of their features apart with us.

    Attributes:
        heads: Number of heads, by which rows are ordered.
        still: Rows of each head before those that turn.
    """

    heads: int
    still: int = 0

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        (one,) = theirs
        by_head = one.unflatten(0, (self.heads, -1))
        turning = by_head[:, self.still :].unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return torch.cat((by_head[:, : self.still], turning), 1).flatten(0, 1)

    def split(self, ours: Tensor) -> list[Tensor]:
        by_head = ours.unflatten(0, (self.heads, -1))
        turning = by_head[:, self.still :].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return [torch.cat((by_head[:, : self.still], turning), 1).flatten(0, 1)]


@dataclass(frozen=True)
class Each:
    """Applies one transform to each of their tensors before the last makes one of them."""

    each: tuple[Transform, ...]
    last: Transform

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        return self.last.join([one.join([tensor]) for one, tensor in zip(self.each, theirs, strict=True)])

    def split(self, ours: Tensor) -> list[Tensor]:
        return [one.split(part)[0] for one, part in zip(self.each, self.last.split(ours), strict=True)]


@dataclass(frozen=True)
class Then:
    """Applies one transform after another."""

    first: Transform
    second: Transform

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        return self.second.join([self.first.join(theirs)])

    def split(self, ours: Tensor) -> list[Tensor]:
        (one,) = self.second.split(ours)
        return self.first.split(one)


@dataclass(frozen=True)
class Rule:
    """Which of their tensors one of our parameters is made of.

    Attributes:
        ours: Name of our parameter.
        theirs: Names of their tensors.
        transform: How ours is made of theirs.
        expert: If the rule is about one expert: its index in our first dimension.
        sliced: Whether their tensors hold all experts, too, and the rule is about this expert's part of them.
    """

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = field(default_factory=Same)
    expert: int | None = None
    sliced: bool = False

    def part(self, ours: Tensor) -> Tensor:
        """Returns the part of our parameter that the rule is about."""
        return ours if self.expert is None else ours[self.expert]
