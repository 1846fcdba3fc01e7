"""How a bucket's shard is stepped: in segments, each in tiles, by which the optimizer knows its state."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tedlab.optim.bucket import Bucket


class Segment:
    """Parameters of a bucket that have always been stepped together, and the tiles of their part of the shard.

    torch leaves a parameter without a gradient as it is, its state and its step count, too. What an optimizer keeps
    beside a tile, such as that count, is one for all parameters in it; so parameters that are no longer stepped
    together part for good: :meth:`divide`. Every process has the same segments. Of a small one it may own no element;
    one empty tile then keeps the count.

    Args:
        bucket: of the parameters.
        parameters: some of the bucket's, in its order.
        optimizer: that has the state.
        tile: elements of a tile at most; None: as many as are together.

    Attributes:
        ranges: where in the shard its elements are.
        tiles: slices of the bucket's master copy, in order; keys of the optimizer's state.
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
        """Whether it is among them."""
        return any(p is parameter for p in self.parameters)

    def split(self, shard: Tensor) -> list[Tensor]:
        """The tiles' slices of a tensor that is laid out like the shard."""
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
        """Of the optimizer, each tensor by element laid out like the shard, zero where it is not this segment's.

        What it keeps beside them (a step count) is as it is.
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
        """The inverse."""
        for tile in self.tiles:
            self._optimizer.state.pop(tile, None)
        for key, value in state.items():
            by_element = isinstance(value, Tensor) and value.dim() > 0
            for tile, part in zip(
                self.tiles, self.split(value) if by_element else [value] * len(self.tiles), strict=True
            ):
                self._optimizer.state[tile][key] = part.clone() if isinstance(part, Tensor) else part

    def divide(self, parameters: Collection[nn.Parameter]) -> "list[Segment]":
        """This segment as two, these parameters and its others, each with its state; as it is, if that leaves one."""
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
