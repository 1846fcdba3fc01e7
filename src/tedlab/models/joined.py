"""Describes blocks that run as one; their parameters are those of ordinary blocks."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from tedlab.comm.rows import Rows
from tedlab.models.block import BlockSpec
from tedlab.moe import MoESpec
from tedlab.spec import Layout, MicroBatch, Sites, Spec, Work


@dataclass(frozen=True)
class JoinedSpec(Spec):
    """Describes blocks that run as one, the last of which has experts.

    Attributes:
        blocks: These blocks, in their order.
    """

    blocks: tuple[BlockSpec, ...]

    def children(self) -> Iterator[tuple[str, Spec]]:
        return ((str(number), block) for number, block in enumerate(self.blocks))

    @property
    def experts(self) -> MoESpec:
        """The layer with experts."""
        layer = self.blocks[-1].feed_forward
        assert isinstance(layer, MoESpec)
        return layer

    def rows(self, layout: Layout, tokens: int) -> Rows:
        """See :meth:`BlockSpec.rows`."""
        return self.blocks[-1].rows(layout, tokens)

    def sites(self, layout: Layout) -> Sites:
        """Returns the collectives of its blocks; what a dense block adds last is read by the next."""
        *earlier, last = (block.sites(layout) for block in self.blocks)
        together = Sites()
        for forward, backward in earlier:
            read = (replace(site, feeds=None) if site.feeds == "end" else site for site in forward)
            together = together.then(Sites(tuple(read), backward))
        return together.then(last)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        *earlier, last = self.blocks
        for block in earlier:
            yield from block.forward(b, dead)
        yield from last.forward(b, dead, stop)


@dataclass(frozen=True)
class MergedSpec(Spec):
    """Stands for a dense block that runs as one with the next, which describes both."""

    def rows(self, layout: Layout, tokens: int) -> Rows:
        """Returns none."""
        return Rows()

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        return iter(())

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        return iter(())
