"""The double-gated mixture (DGMoE) to which ScMoE's authors compare their shortcut (arXiv 2404.05019).

The same routed experts serve two tensors of each token, those that the feed-forward layers of a pair of blocks read::

    a = x + Attention(n1(x))                  u = n2(a)          of the dense block
    b = a + FeedForward(u)
    c = b + Attention'(n1'(b))                v = n2'(c)         of the block with experts
    y = c + Experts(u) + Experts(v)

Each is routed to one expert by the same router, and the two experts of a token differ: if both would be the same, v
gets its second choice. To the layer these are two tokens. It takes twice as many samples, those of v after those of u,
so that capacity, losses and exchanges are those of so many tokens, and the first find room before the second.

Both travel together as soon as there is v, so nothing runs beside the exchange: this is there to be compared by its
quality.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tedlab.models.block import Block
from tedlab.models.joined import JoinedSpec
from tedlab.moe import RouterReport
from tedlab.spec import Layout, MicroBatch, Site, Sites, Work, WorkingSet


@dataclass(frozen=True)
class DoubleGatedSpec(JoinedSpec):
    """Describes a :class:`DoubleGatedBlocks`."""

    def sites(self, layout: Layout) -> Sites:
        forward, backward = super().sites(layout)
        of_experts = {site.tag for part in self.experts.sites(layout) for site in part}

        def moved(site: Site) -> Site:
            doubled = site.tag in of_experts and site.rows in ("tokens", "dealt")
            return replace(site, width=2 * site.width) if doubled else site

        return Sites(tuple(map(moved, forward)), tuple(map(moved, backward)))

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        first, last = self.blocks
        stream = b.outside * last.model.hidden
        yield from first.forward(b, dead)
        yield from last.norm1.forward(b)
        yield from last.attention.forward(b, dead)
        yield from last.norm2.forward_of_sum(b)
        yield b.moved(4 * stream, b.parameter)  # joins both tensors
        yield from self.experts.forward(self.twice(b), dead, stop)
        if not stop:
            for _ in range(2):
                yield b.moved(stream, b.parameter, b.parameter, b.compute)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        first, last = self.blocks
        stream = b.outside * last.model.hidden
        yield b.moved(4 * stream, b.parameter)  # joins the gradients of both results
        yield from self.experts.backward(self.twice(b))
        yield from last.norm2.backward_beside(b)
        yield from last.attention.backward(b)
        yield from last.norm1.backward_beside(b)
        yield b.moved(3 * stream, b.parameter)  # adds both gradients of what the dense layer and the router read
        yield from first.backward(b)

    def saved(self, b: MicroBatch) -> int:
        first, last = self.blocks
        others = sum(layer.saved(b) for layer in (first, last.norm1, last.attention, last.norm2))
        return others + self.experts.saved(self.twice(b))

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        """Yields those of the experts, of attention and of the dense block, the last first."""
        first, last = self.blocks
        yield from self.experts.working_sets(self.twice(b), recomputed)
        done = last.norm2.gradients(b) + self.experts.gradients(b)
        freed = last.norm2.saved(b) + self.experts.saved(self.twice(b))
        for moment in last.attention.working_sets(b, recomputed):
            yield moment._replace(done=moment.done + done, freed=moment.freed + freed)
        done, freed = last.gradients(b), freed + last.norm1.saved(b) + last.attention.saved(b)
        for moment in first.working_sets(b, recomputed):
            yield moment._replace(done=moment.done + done, freed=moment.freed + freed)

    def twice(self, b: MicroBatch) -> MicroBatch:
        """Returns what the layer with experts computes with: two tokens for each. Its rows are counted so already."""
        return replace(b, tokens=2 * b.tokens)


class DoubleGatedBlocks(nn.Module):
    """Runs a dense block and one with experts as one.

    Args:
        blocks: The blocks, which hold all parameters.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self, x: Tensor, rotation: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, RouterReport | None]:
        """Maps activations (B, S, H) to (B, S, H), and returns the router's report. Arguments as of :class:`Block`."""
        dense, routed = cast(list[Any], self.blocks)
        x = x + dense.attention(dense.norm1(x), rotation)
        u = dense.norm2(x)
        x = x + dense.feed_forward(u)
        x = x + routed.attention(routed.norm1(x), rotation)
        v = routed.norm2(x)
        both = None if padding_mask is None else padding_mask.repeat(2, 1)
        y, report = routed.feed_forward(torch.cat((u, v)), both)
        of_u, of_v = y.chunk(2)
        return x + of_u + of_v, report
