"""The kernels of a step, one after the other, as work for the roofline: forward, recomputed and backward.

Written from the layers' mathematics. Left out are kernels on vectors and on a router's indices beyond their rough sum.
Letters as in ``sizes.py``.
"""

from collections.abc import Iterator

import torch

from tedlab.predict.estimate.sizes import Sizes
from tedlab.predict.sim.roofline import Work

_INDICES = 480  # bytes that routing moves for each choice of a token: sorting, slots, and their inverse
_SCORES = 53, 40  # bytes per token and expert, forward and backward: softmax, losses, counts


class Kernels:
    """All kernels that a rank runs, phase by phase."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        config, form = sizes.config, sizes.form
        layout = form.layout
        self.sequence, self.sliced, self.scattered = layout.sequence, layout.sharers > 1, layout.scattered
        self.experts_here = config.moe.num_experts // form.degrees.expert  # e
        self.reordered = form.degrees.expert > 1 and self.experts_here > 1

    # ---- blocks --------------------------------------------------------------------------------------------------

    def routed(self, block: int) -> bool:
        """Whether a block has experts."""
        return self.sizes.form.spec.blocks[block].moe is not None

    def forward(self, block: int) -> Iterator[Work]:
        """A block's first pass."""
        yield from self._attention()
        yield from self._routed() if self.routed(block) else self._dense()

    def recompute(self, block: int) -> Iterator[Work]:
        """A block's second pass: without products that nobody needs, and with early stop only as far as needed."""
        s = self.sizes
        second, early = s.second_pass(block), s.config.model.recompute.early_stop
        yield from self._attention(dead=s.product_is_dead("attention.reduce", second))
        if s.form.spec.blocks[block].moe is not None:
            yield from self._routed(dead=s.product_is_dead("experts.reduce", second), early=early)
        else:
            yield from self._dense(dead=early or s.product_is_dead("feed_forward.reduce", second), early=early)

    def backward(self, block: int) -> Iterator[Work]:
        """A block's gradients."""
        yield from (self._routed_backward() if self.routed(block) else self._dense_backward())
        yield from self._attention_backward()

    def _attention(self, dead: bool = False) -> Iterator[Work]:
        s = self.sizes
        yield from self._enter(3 * s.hidden // s.tensor)
        yield self._product(s.tokens, s.hidden, 3 * s.hidden // s.tensor)
        yield self._scores(4)
        yield from self._leave(s.hidden // s.tensor, dead)
        yield from self._residual()

    def _dense(self, dead: bool = False, early: bool = False) -> Iterator[Work]:
        s = self.sizes
        yield from self._enter(s.ffn_part)
        yield self._product(s.tokens, s.hidden, s.ffn_part)
        yield self._moved(2 * s.tokens * s.ffn_part)  # GELU
        if not early:
            yield from self._leave(s.ffn_part, dead)
            yield from self._residual()

    def _routed(self, dead: bool = False, early: bool = False) -> Iterator[Work]:
        s, moe = self.sizes, self.sizes.config.moe
        width, chosen = s.hidden, s.outside * moe.top_k
        yield self._moved(2 * s.outside * width, s.parameter)  # norm
        if s.precise != s.parameter:
            yield self._moved(s.outside * width, s.parameter + s.precise)
        yield self._product(s.outside, width, moe.num_experts, precise=True)
        yield self._moved(s.outside * moe.num_experts, _SCORES[0])
        yield self._moved(chosen, _INDICES)
        if s.mixed:
            yield self._moved(s.outside * width, s.parameter + s.compute)
            yield self._moved(2 * self.experts_here * width * s.ffn_part, s.parameter + s.compute)
        yield from self._rows(s.sent if s.form.layout.sequence else s.slots)
        yield from self._to_experts()
        yield from self._expert_product(width, s.ffn_part)
        yield self._moved(2 * s.slots * s.ffn_part)  # GELU
        if not dead:
            yield from self._expert_product(s.ffn_part, width)
        if self.scattered:
            yield self._moved(2 * s.slots * width)  # into the order of receivers
        yield self._moved(2 * (s.sent if self.scattered else s.slots) * width)  # bias
        yield from self._from_experts()
        yield from self._rows(chosen)
        if not early:
            yield self._moved(2 * chosen * width)  # gate
            yield self._moved((chosen + s.outside) * width)
            yield from self._residual()

    def _attention_backward(self) -> Iterator[Work]:
        s = self.sizes
        part = s.hidden // s.tensor
        yield from self._leave_backward(part)
        yield self._scores(10)
        yield self._moved(6 * s.tokens * part)  # q, k and v together
        yield from self._enter_backward(3 * part)

    def _dense_backward(self) -> Iterator[Work]:
        s = self.sizes
        yield from self._leave_backward(s.ffn_part)
        yield self._moved(3 * s.tokens * s.ffn_part)  # GELU
        yield from self._enter_backward(s.ffn_part)

    def _routed_backward(self) -> Iterator[Work]:
        s, moe = self.sizes, self.sizes.config.moe
        width, chosen = s.hidden, s.outside * moe.top_k
        yield self._moved(3 * chosen * width)  # of the gate
        yield self._moved(2 * chosen * width)  # through it
        yield self._moved(chosen * width)
        yield from self._rows(s.sent if s.form.layout.sequence else s.slots)
        yield from self._to_experts()
        yield self._moved(s.slots * width)  # of the bias
        for k, n in ((width, s.ffn_part), (s.ffn_part, width)):
            yield from self._expert_product(k, n)
            yield from self._expert_product(k, n, of_weight=True)
            yield self._moved((3 if k == width else 1) * s.slots * s.ffn_part)  # GELU, and the other bias
        if s.mixed:
            yield self._moved(2 * self.experts_here * width * s.ffn_part, s.parameter + s.compute)
        if self.scattered:
            yield self._moved(2 * s.slots * width)
        yield from self._from_experts()
        yield from self._rows(chosen)
        yield self._moved(3 * (moe.top_k - 1) * s.outside * width)
        yield self._moved(s.outside * moe.num_experts, _SCORES[1])
        yield self._product(moe.num_experts, s.outside, width, precise=True)
        yield self._product(s.outside, moe.num_experts, width, precise=True)
        if s.precise != s.parameter:
            yield self._moved(s.outside * width, s.parameter + s.precise)
        yield self._moved(3 * s.outside * width, s.parameter)  # the router's and the experts'
        yield from self._norm_backward()

    # ---- before and after ----------------------------------------------------------------------------------------

    def ends_forward(self) -> Iterator[Work]:
        """Embeddings, the last norm, logits and loss."""
        s = self.sizes
        for passes in (2, 2):  # look-up, mask
            yield self._moved(passes * s.tokens * s.hidden, s.parameter)
        yield self._moved(2 * s.outside * s.hidden, s.parameter)  # positions
        yield from self._enter(s.vocabulary_part)
        yield self._product(s.tokens, s.hidden, s.vocabulary_part)
        yield self._moved(s.tokens * s.vocabulary_part, s.compute + s.precise)
        for passes in (1, 2, 2, 1, 2):  # maximum, difference, exp, sum, quotient
            yield self._moved(passes * s.tokens * s.vocabulary_part, s.precise)

    def ends_backward(self) -> Iterator[Work]:
        """The same, backwards."""
        s = self.sizes
        yield self._moved(2 * s.tokens * s.vocabulary_part, s.precise)
        if s.precise != s.compute:
            yield self._moved(s.tokens * s.vocabulary_part, s.precise + s.compute)
        yield from self._product_backward(s.tokens, s.hidden, s.vocabulary_part)
        yield from self._norm_backward(residual=False)
        yield self._moved(s.outside * s.hidden, s.parameter)  # positions
        yield self._moved(2 * s.tokens * s.hidden, s.parameter)
        table = s.vocabulary_part * s.hidden
        yield self._moved(table + s.tokens * s.hidden, s.parameter)
        if s.config.model.tie_embeddings:
            yield self._moved(3 * table, s.parameter)

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _enter(self, width: int) -> Iterator[Work]:
        """Norm, and what a column-parallel layer of so many features does before its product."""
        s = self.sizes
        yield self._moved(2 * s.outside * s.hidden, s.parameter)
        if s.mixed:
            yield self._moved(s.outside * s.hidden + s.hidden * width, s.parameter + s.compute)
        if self.sequence:
            yield self._moved(2 * s.tokens * s.hidden)

    def _leave(self, width: int, dead: bool) -> Iterator[Work]:
        """A row-parallel layer of so many input features."""
        s = self.sizes
        if s.mixed:
            yield self._moved(s.hidden * width, s.parameter + s.compute)
        if not dead:
            yield self._product(s.tokens, width, s.hidden)
            if self.sequence:
                yield self._moved(2 * s.tokens * s.hidden)
        yield self._moved(2 * s.outside * s.hidden)  # bias

    def _residual(self) -> Iterator[Work]:
        s = self.sizes
        yield self._moved(s.outside * s.hidden, 2 * s.parameter + s.compute)

    def _leave_backward(self, width: int) -> Iterator[Work]:
        s = self.sizes
        if s.mixed:
            yield self._moved(s.outside * s.hidden, s.parameter + s.compute)
        if self.sequence:
            yield self._moved(2 * s.tokens * s.hidden)
        yield self._moved(s.tokens * s.hidden)  # of the bias
        yield from self._product_backward(s.tokens, width, s.hidden)

    def _enter_backward(self, width: int) -> Iterator[Work]:
        s = self.sizes
        yield from self._product_backward(s.tokens, s.hidden, width)
        yield self._moved(s.tokens * width)  # of the bias
        if self.sequence:
            yield self._moved(2 * s.tokens * s.hidden)
        yield from self._norm_backward()

    def _norm_backward(self, residual: bool = True) -> Iterator[Work]:
        s = self.sizes
        if s.mixed:
            yield self._moved(s.outside * s.hidden, s.parameter + s.compute)
        yield self._moved(3 * s.outside * s.hidden, s.parameter)
        if residual:
            yield self._moved(3 * s.outside * s.hidden, s.parameter)

    def _to_experts(self) -> Iterator[Work]:
        """Reorderings between a token's slot and its expert; also those of the gradient of what comes back."""
        s = self.sizes
        if self.sliced and not self.sequence:
            yield self._moved(2 * s.sent * s.hidden)
        if self.reordered:
            yield self._moved(2 * s.sent * s.hidden)
        if self.sliced:
            yield self._moved(2 * s.slots * s.hidden)

    def _from_experts(self) -> Iterator[Work]:
        """The way back."""
        s = self.sizes
        if self.sliced and not self.scattered:
            yield self._moved(2 * s.sent * s.hidden)
        if self.reordered:
            yield self._moved(2 * s.sent * s.hidden)
        if self.sliced and not self.sequence:
            yield self._moved(2 * s.slots * s.hidden)

    def _rows(self, rows: int) -> Iterator[Work]:
        """Rows by index, and zeros in place of those that are missing."""
        for _ in range(2):
            yield self._moved(2 * rows * self.sizes.hidden)

    def _scores(self, flops: int) -> Work:
        """Causal attention of a tensor rank's heads, with so many FLOPs for each pair of positions and feature."""
        s = self.sizes
        part = s.hidden // s.tensor
        pairs = s.tokens * s.config.model.sequence_length / 2
        moved = (flops if flops == 4 else 8) * s.tokens * part * s.compute
        return Work(flops * pairs * part, moved, s.form.compute, "attention")

    def _product(self, m: int, k: int, n: int, precise: bool = False) -> Work:
        s = self.sizes
        dtype = s.form.precise if precise else s.form.compute
        return Work(2 * m * k * n, (m * k + k * n + m * n) * dtype.itemsize, dtype, "gemm")

    def _product_backward(self, m: int, k: int, n: int) -> Iterator[Work]:
        s = self.sizes
        yield self._product(m, n, k)
        yield self._product(k, m, n)
        if s.mixed:
            yield self._moved(k * n, s.parameter + s.compute)

    def _expert_product(self, k: int, n: int, of_weight: bool = False) -> Iterator[Work]:
        s, e = self.sizes, self.experts_here
        rows = s.slots // e
        one = self._product(k, rows, n) if of_weight else self._product(rows, k, n)
        yield Work(e * one.flops, e * one.bytes, one.dtype, "gemm")

    def _moved(self, elements: float, size: int | None = None) -> Work:
        """An operation limited by memory that reads and writes so many elements in all."""
        return Work(0, elements * (self.sizes.compute if size is None else size), torch.float32, "arithmetic")
