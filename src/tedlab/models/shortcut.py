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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from tedlab.config import CommOptions, Shortcut
from tedlab.models.block import Block
from tedlab.models.joined import JoinedSpec
from tedlab.moe import RouterReport
from tedlab.spec import MicroBatch, Spec, WorkingSet

# How many sub-layers routed experts run beside: those from the one that reads the same tensor to the shared experts.
BESIDE = {Shortcut.POS1.value: 2, Shortcut.POS2.value: 3, Shortcut.POS3.value: 4}


@dataclass(frozen=True)
class ShortcutSpec(JoinedSpec):
    """Describes a :class:`ShortcutBlocks`: a block with shared experts, after its dense block if it has one.

    Attributes:
        beside: The number of sub-layers that routed experts run beside.
    """

    beside: int

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
