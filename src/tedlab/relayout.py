"""Which elements of parameters go from which process to which when another layout takes over.

Both layouts divide the same parameters over the same processes, so that every process can plan alike what all of them
send: whatever a process needs and does not hold comes from the nearest process that holds it. :func:`moves` plans,
:func:`relayout` moves. Nothing here knows about models.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tedlab.comm import Collectives, Splits
from tedlab.degrees import ParallelDegrees
from tedlab.spec import ParameterSpec

TAG = "relayout.exchange"  # of the collective
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


@torch.no_grad()
def relayout(
    parameters: Sequence[ParameterSpec],
    source: nn.Module,
    target: nn.Module,
    layouts: tuple[ParallelDegrees, ParallelDegrees],
    comm: Collectives,
) -> None:
    """Copies the weights of a model into the same model in another layout, by one exchange of all processes.

    Args:
        parameters: What moves, by the names that it has in both modules; all of one dtype.
        source, target: The modules, whose parameters are DTensors. Those of ``target`` are overwritten.
        layouts: The layouts of the two, of equally many processes.
        comm: The collectives of either, of which the world's is used.

    Raises:
        ValueError: If the layouts have different numbers of processes, or parameters different dtypes.
    """
    rank, world = comm.rank("world"), comm.size("world")
    modules: list[dict[str, Any]] = [dict(module.named_parameters()) for module in (source, target)]
    weights = [{p.name: module[p.name].detach().to_local() for p in parameters} for module in modules]
    dtypes = {weight.dtype for of_module in weights for weight in of_module.values()}
    if len(dtypes) > 1:
        raise ValueError(f"parameters of {' and '.join(sorted(map(str, dtypes)))} cannot move together: convert them")
    outgoing: defaultdict[int, list[Tensor]] = defaultdict(list)
    incoming: defaultdict[int, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        own, new = (
            (held(parameter, degrees, rank), weight[parameter.name])
            for degrees, weight in zip(layouts, weights, strict=True)
        )
        for move in moves_of(parameter, *layouts):
            if move.sender == rank == move.receiver:
                _part(*new, move.box).copy_(_part(*own, move.box))
            elif move.sender == rank:
                outgoing[move.receiver].append(_part(*own, move.box))
            elif move.receiver == rank:
                incoming[move.sender].append(_part(*new, move.box))
    sent, received = ([sum(map(Tensor.numel, parts[peer])) for peer in range(world)] for parts in (outgoing, incoming))
    parts = [part.flatten() for peer in range(world) for part in outgoing[peer]]
    flat = torch.cat(parts) if parts else weights[0][parameters[0].name].new_empty(0)
    arrived = comm.all_to_all(flat, "world", tag=TAG, phase="checkpoint", splits=Splits(tuple(sent), tuple(received)))
    places = [part for peer in range(world) for part in incoming[peer]]
    for place, values in zip(places, arrived.split([part.numel() for part in places]), strict=True):
        place.copy_(values.view_as(place))


def _part(box: Box, local: Tensor, part: Box) -> Tensor:
    """Returns a view of a part of what a process holds."""
    return local[tuple(slice(p.start - b.start, p.stop - b.start) for b, p in zip(box, part, strict=True))]
