"""Which matrices a process's parts of parameters belong to, and which process makes each of them whole.

The optimizer (``matrices.py``) and the closed form of its communication share this; neither memory nor processes are
here.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tedlab.degrees import GroupKind
from tedlab.spec import Fused

# The group that divides a parameter itself, by that which divides its optimizer state.
INNER: dict[GroupKind, GroupKind] = {"data": "tensor", "expert_data": "expert_tensor"}


class Owner(NamedTuple):
    """Who makes a block whole.

    Attributes:
        across: Rank in the group that divides the optimizer's state.
        inner: Rank in the tensor group of that process; None: each of its processes has the block and does the same.
    """

    across: int
    inner: int | None


@dataclass(frozen=True)
class Block:
    """A contiguous part of a parameter in one process: a matrix, or several that are fused.

    Attributes:
        shape: Rows and columns in this process.
        divided: Dimension along which it is one part of as many as the tensor group has processes; None: it is whole.
        fused: How several matrices are fused; None: it is one.
    """

    shape: tuple[int, int]
    divided: int | None = None
    fused: Fused | None = None

    @property
    def elements(self) -> int:
        """The number of its elements in this process."""
        return self.shape[0] * self.shape[1]

    def matrices(self, whole: Tensor) -> list[Tensor]:
        """Returns the matrices that a whole block consists of."""
        if self.fused is None:
            return [whole]
        dim, widths = self.fused
        return [part.flatten(dim, dim + 1) for part in whole.unflatten(dim, (-1, sum(widths))).split(widths, dim + 1)]

    def joined(self, matrices: Sequence[Tensor]) -> Tensor:
        """Inverts :meth:`matrices`."""
        if self.fused is None:
            return matrices[0]
        dim, widths = self.fused
        parts = [x.unflatten(dim, (-1, width)) for x, width in zip(matrices, widths, strict=True)]
        return torch.cat(parts, dim + 1).flatten(dim, dim + 1)

    def shapes(self, processes: int) -> Iterator[tuple[int, int]]:
        """Yields the shapes of its matrices, if so many processes of a tensor group divide it."""
        whole = [n * processes if dim == self.divided else n for dim, n in enumerate(self.shape)]
        if self.fused is None:
            yield whole[0], whole[1]
            return
        dim, widths = self.fused
        for width in widths:
            whole_of_one = list(whole)
            whole_of_one[dim] = whole[dim] // sum(widths) * width
            yield whole_of_one[0], whole_of_one[1]


def blocks_of(shape: Sequence[int], divided: int | None, fused: Fused | None) -> list[Block]:
    """Returns the blocks of a parameter of two dimensions, or of three, of which each slice is one, in order.

    Args:
        shape: Shape in this process.
        divided: Dimension that the tensor group divides.
        fused: See :class:`tedlab.spec.ParameterSpec`.
    """
    skipped = len(shape) - 2
    of_block = None if divided is None or divided < skipped else divided - skipped  # a divided stack has whole slices
    fused = None if fused is None else Fused(fused.dim - skipped, fused.widths)
    block = Block((shape[-2], shape[-1]), of_block, fused)
    return [block] * (shape[0] if skipped else 1)


def cost(block: Block, processes: int) -> int:
    """Returns what the time to make a block's matrices orthogonal is proportional to."""
    return sum(4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3 for s in block.shapes(processes))


def owners(blocks: Sequence[Block], across: int, tensor: int) -> list[Owner]:
    """Divides the work of blocks over processes: the costliest first, each to whoever has least to do.

    Args:
        blocks: Blocks of parameters whose state ``across`` processes divide.
        across: Number of processes that divide their state.
        tensor: Number of processes of a tensor group, of which each has the same blocks of other parts.
    """
    costs = [cost(block, tensor) for block in blocks]
    order = sorted(range(len(blocks)), key=lambda n: -costs[n])
    found: dict[int, Owner] = {}
    free = [(0, a) for a in range(across)]
    for n in order:
        if blocks[n].divided is None:  # all processes of a tensor group have it
            load, a = free[0]
            heapq.heapreplace(free, (load + costs[n], a))
            found[n] = Owner(a, None)
    loads: Mapping[int, int] = {a: load for load, a in free}
    each = [(loads[a], a, t) for a in range(across) for t in range(tensor)]
    heapq.heapify(each)
    for n in order:
        if blocks[n].divided is not None:
            load, a, t = each[0]
            heapq.heapreplace(each, (load + costs[n], a, t))
            found[n] = Owner(a, t)
    return [found[n] for n in range(len(blocks))]


def overlap(start: int, elements: int, shard: int, size: int) -> slice:
    """Returns which part of a range of a bucket, counted from the range's start, a shard of this size holds."""
    first = min(max(shard * size - start, 0), elements)
    last = min(max((shard + 1) * size - start, 0), elements)
    return slice(first, last)
