"""Segments of a bucket's shard, which are stepped in tiles; the tiles are the keys of the optimizer's state."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tedlab.optim.bucket import Bucket


class Segment:
    """Parameters of a bucket that have always been stepped together, and the tiles of their part of the shard.

    torch leaves a parameter without a gradient alone, with its state and its step count. Such a count belongs to a
    whole tile, so to all parameters in it; parameters that are no longer stepped together therefore part for good, by
    :meth:`divide`. Every process has the same segments. It may own no element of a small one; one empty tile then keeps
    the count.

    Args:
        bucket: Bucket of the parameters.
        parameters: Some of the bucket's, in its order.
        optimizer: The optimizer that has the state.
        tile: Maximum number of elements of a tile; None: as many as are contiguous.

    Attributes:
        ranges: Where in the shard its elements are.
        tiles: Slices of the bucket's master copy, in order; keys of the optimizer's state.
    """

    def __init__(
        self, bucket: Bucket, parameters: Sequence[nn.Parameter], optimizer: Optimizer, tile: int | None
    ) -> None:
        self.bucket = bucket
        self.parameters = list(parameters)
        self.ranges = bucket.ranges(set(parameters))
        self.tiles = [
            nn.Parameter(piece)
            for where in self.ranges
            for piece in bucket.master[where].split(tile or max(1, where.stop - where.start))
        ]
        self._optimizer = optimizer
        self._tile = tile

    def holds(self, parameter: nn.Parameter) -> bool:
        """Tells whether a parameter is in this segment."""
        return any(p is parameter for p in self.parameters)

    def places(self) -> list[slice]:
        """Returns where in the shard each tile is."""
        found = []
        for where in self.ranges:
            size = self._tile or max(1, where.stop - where.start)
            starts = range(where.start, where.stop, size) or [where.start]  # an empty range has one empty tile
            found += [slice(start, min(start + size, where.stop)) for start in starts]
        return found

    def split(self, shard: Tensor) -> list[Tensor]:
        """Returns the tiles' slices of a tensor that is laid out like the shard."""
        sizes = [tile.numel() for tile in self.tiles]
        if len(self.ranges) == 1:
            return list(shard[self.ranges[0]].split(sizes))
        pieces = iter([shard[where] for where in self.ranges])
        found: list[Tensor] = []
        rest = next(pieces)
        for size in sizes:
            if not rest.numel():
                rest = next(pieces, rest)
            found.append(rest[:size])
            rest = rest[size:]
        return found

    def state(self) -> dict[str, Any]:
        """Returns the optimizer's state, with tensors by element laid out like the shard and zero outside this segment.

        Other values, such as a step count, are returned as they are.
        """
        joined: dict[str, Any] = {}
        for key, first in self._optimizer.state.get(self.tiles[0], {}).items():
            joined[key] = first
            if isinstance(first, Tensor) and first.shape == self.tiles[0].shape:
                joined[key] = first.new_zeros(self.bucket.shard_size)
                for tile, part in zip(self.tiles, self.split(joined[key]), strict=True):
                    part.copy_(self._optimizer.state[tile][key])
        return joined

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over a state as :meth:`state` returns it."""
        for tile in self.tiles:
            self._optimizer.state.pop(tile, None)
        for key, value in state.items():
            by_element = isinstance(value, Tensor) and value.dim() > 0
            for tile, part in zip(
                self.tiles, self.split(value) if by_element else [value] * len(self.tiles), strict=True
            ):
                self._optimizer.state[tile][key] = part.clone() if isinstance(part, Tensor) else part

    def divide(self, parameters: Collection[nn.Parameter]) -> "list[Segment]":
        """Divides off these parameters, with their state; returns this segment alone if a part would be empty."""
        halves = [[p for p in self.parameters if (p in parameters) is among] for among in (True, False)]
        if not all(halves):
            return [self]
        state = self.state()
        for tile in self.tiles:
            self._optimizer.state.pop(tile, None)
        segments = [Segment(self.bucket, half, self._optimizer, self._tile) for half in halves]
        for segment in segments:
            segment.load(state)
        return segments
