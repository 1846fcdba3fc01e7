"""Shortcut-connected experts (ScMoE, arXiv 2404.05019): routed experts read what an earlier sub-layer reads.

Their exchange then has something to run beside: all sub-layers from that one on. The parameters are those of ordinary
blocks; only what runs as a whole changes. With ``pos1`` that is a block with experts, with ``pos2`` and ``pos3`` a pair
of a dense block and one with experts::

    a = x + Attention(n1(x))                  u = n2(a)          of the dense block
    b = a + FeedForward(u)
    c = b + Attention'(n1'(b))                v = n2'(c)         of the block with experts
    y = c + Shared(v) + Experts(z)            z = n1'(b): pos1, u: pos2, n1(x): pos3

The paper omits norms. Here z is normed as the sub-layer that reads the same tensor norms it (at pos2 as LongCat-Flash
does), and the coefficients of ``moe.shared.combine`` are functions of v.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from tedlab.comm.rows import Rows
from tedlab.config import CommOptions, Shortcut
from tedlab.models.block import Block, BlockSpec
from tedlab.moe import MoESpec, RouterReport
from tedlab.spec import Layout, MicroBatch, Sites, Spec, Work, WorkingSet

# How many sub-layers routed experts run beside: those from the one that reads the same tensor to the shared experts.
BESIDE = {Shortcut.POS1.value: 2, Shortcut.POS2.value: 3, Shortcut.POS3.value: 4}


@dataclass(frozen=True)
class ShortcutSpec(Spec):
    """Describes a :class:`ShortcutBlocks`.

    Attributes:
        blocks: A block with shared experts, after the dense block that it forms a pair with, if it does.
        beside: The number of sub-layers that routed experts run beside.
    """

    blocks: tuple[BlockSpec, ...]
    beside: int

    def children(self) -> Iterator[tuple[str, Spec]]:
        return ((str(number), block) for number, block in enumerate(self.blocks))

    @property
    def experts(self) -> MoESpec:
        """The layer whose routed experts read an earlier sub-layer's tensor."""
        layer = self.blocks[-1].feed_forward
        assert isinstance(layer, MoESpec)
        return layer

    @property
    def sublayers(self) -> list[tuple[Spec, Spec]]:
        """Each sub-layer after its norm, in order; the last are the shared experts."""
        found: list[tuple[Spec, Spec]] = []
        for block in self.blocks:
            found += [(block.norm1, block.attention), (block.norm2, block.feed_forward)]
        assert self.experts.shared is not None
        found[-1] = self.blocks[-1].norm2, self.experts.shared
        return found

    def slot(self, options: CommOptions, length: int) -> int:
        """Returns the number of the sub-layer before which routed experts compute, or that of sub-layers.

        Unless the options say, the FLOPs beside dispatch and beside combine are as equal as can be. Both move the same
        bytes, so this is best however fast the links are.

        Args:
            options: The options of communication.
            length: The number of tokens of a sample.
        """
        number = len(self.sublayers)
        if options.shortcut_slot is not None:
            return number - self.beside + options.shortcut_slot
        first, costs = number - self.beside, [layer.flops(length).total() for _, layer in self.sublayers]
        return min(range(first, number + 1), key=lambda slot: abs(sum(costs[first:slot]) - sum(costs[slot:])))

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

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        """Yields those of the sub-layers, the last first, and of routed experts in the place where they compute."""
        parts, experts = self.sublayers, self.experts.routed_alone
        parts.insert(self.slot(b.layout.options, b.length), (Spec(), experts))
        done = freed = 0
        for norm, layer in reversed(parts):
            for moment in layer.working_sets(b, recomputed):
                yield moment._replace(done=moment.done + done, freed=moment.freed + freed)
            done += layer.gradients(b) + norm.gradients(b)
            freed += layer.saved(b) + norm.saved(b)
            if layer is experts:
                freed -= self.experts.read_twice(b)


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


def units(blocks: Sequence[BlockSpec]) -> list[BlockSpec | ShortcutSpec | MergedSpec]:
    """Returns for each block what runs as a whole; a pair stands at its second block."""
    found: list[BlockSpec | ShortcutSpec | MergedSpec] = list(blocks)
    for index, block in enumerate(blocks):
        if block.moe is not None and block.moe.shortcut != Shortcut.NONE:
            pair = block.moe.paired
            found[index] = ShortcutSpec(tuple(blocks[index - pair : index + 1]), BESIDE[block.moe.shortcut])
            found[index - pair : index] = [MergedSpec()] * pair
    return found


class ShortcutBlocks(nn.Module):
    """Runs a block with shared experts, or a dense block and then such a block, as one.

    Args:
        spec: Its specification.
        blocks: The blocks, which hold all parameters.
        options: The options of communication.
        length: The number of tokens of a sample, for which the place of the experts' computation is chosen.
    """

    def __init__(self, spec: ShortcutSpec, blocks: Sequence[Block], options: CommOptions, length: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.reads = 2 * len(blocks) - spec.beside
        self.slot = spec.slot(options, length)

    def forward(
        self, x: Tensor, rotation: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, RouterReport | None]:
        """Maps activations (B, S, H) to (B, S, H), and returns the router's report. Arguments as of :class:`Block`."""
        experts: Any = cast(Block, self.blocks[-1]).feed_forward
        sublayers: list[Any] = []
        for block in cast(list[Any], self.blocks):
            sublayers += [(block.norm1, partial(block.attention, rotation=rotation)), (block.norm2, block.feed_forward)]
        sublayers[-1] = self.blocks[-1].norm2, experts.shared.beside
        for number, (norm, layer) in enumerate(sublayers):
            read = norm(x)
            if number == self.reads:
                tokens = experts.begin(read, padding_mask)
            if number == self.slot:
                back = experts.compute(tokens)
            made = layer(read)
            if number + 1 < len(sublayers):
                x = x + made
        if self.slot == len(sublayers):
            back = experts.compute(tokens)
        return x + experts.join(back.wait().view_as(x), made), tokens.routing.report
