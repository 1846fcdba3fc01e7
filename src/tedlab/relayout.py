"""Which elements of parameters go from which process to which when another layout takes over.

Both layouts divide the same parameters over the same processes, so that every process can plan alike what all of them
send: whatever a process needs and does not hold comes from the nearest process that holds it. :func:`moves` plans,
:func:`relayout` moves. Nothing here knows about models.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from tedlab.degrees import ParallelDegrees
from tedlab.spec import ParameterSpec

Box = tuple[range, ...]  # the indices of a part of a tensor, by dimension


class Move(NamedTuple):
    """A part of a parameter that a process needs in the new layout.

    Attributes:
        sender: The rank that has it: the receiver itself, if it does.
        receiver: The rank that needs it.
        box: Its indices in the whole parameter.
    """

    sender: int
    receiver: int
    box: Box

    @property
    def elements(self) -> int:
        """The number of its elements."""
        return prod(map(len, self.box))


def held(parameter: ParameterSpec, degrees: ParallelDegrees, rank: int) -> Box:
    """Returns the part of a parameter that a process holds."""
    box = [range(size) for size in parameter.shape]
    places = degrees.coordinates(rank)
    for axis, dim in parameter.placed(degrees).items():
        width = parameter.shape[dim] // getattr(degrees, axis)
        place = places[axis]  # type: ignore[index]  # axes of meshes are kinds of groups
        box[dim] = range(place * width, (place + 1) * width)
    return tuple(box)


@cache
def moves(old: tuple[Box, ...], new: tuple[Box, ...]) -> tuple[Move, ...]:
    """Returns the parts that processes need, by receiver and then by place in the parameter.

    Args:
        old, new: What each process holds in the two layouts; the parts of a layout are equal or have nothing in common.
    """
    holders: dict[Box, list[int]] = {}
    for rank, box in enumerate(old):
        holders.setdefault(box, []).append(rank)
    found = []
    for receiver, needed in enumerate(new):
        for box in _overlapping(old[0], needed):
            sender = min(holders[box], key=lambda rank: (abs(rank - receiver), rank))
            found.append(Move(sender, receiver, _common(box, needed)))
    return tuple(found)


def moves_of(parameter: ParameterSpec, old: ParallelDegrees, new: ParallelDegrees) -> tuple[Move, ...]:
    """Returns what moves of a parameter, see :func:`moves`.

    Raises:
        ValueError: If the layouts have different numbers of processes.
    """
    if old.world_size != new.world_size:
        raise ValueError(f"weights cannot move between {old.world_size} and {new.world_size} processes: use as many")
    ranks = range(old.world_size)
    of_old, of_new = (tuple(held(parameter, degrees, rank) for rank in ranks) for degrees in (old, new))
    return moves(of_old, of_new)


def moved_elements(parameters: Sequence[ParameterSpec], old: ParallelDegrees, new: ParallelDegrees) -> np.ndarray:
    """Returns how many elements each process gets from each, (senders, receivers) int64; itself on the diagonal."""
    counts_sr = np.zeros((old.world_size, old.world_size), dtype=np.int64)
    for parameter in parameters:
        for move in moves_of(parameter, old, new):
            counts_sr[move.sender, move.receiver] += move.elements
    return counts_sr


def _overlapping(part: Box, needed: Box) -> Iterator[Box]:
    """Yields the parts, all as large as ``part``, that a box has something in common with, in their order."""
    widths = [len(extent) for extent in part]
    firsts = [
        range(extent.start // width * width, extent.stop, width) for extent, width in zip(needed, widths, strict=True)
    ]
    for starts in product(*firsts):
        yield tuple(range(start, start + width) for start, width in zip(starts, widths, strict=True))


def _common(one: Box, other: Box) -> Box:
    return tuple(range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
