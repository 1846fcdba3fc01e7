"""What experts without a capacity that are all in each process do, see ``local.py``: they send, compute and keep."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from typing_extensions import override

from tedlab.moe.dispatch import DispatchSpec
from tedlab.moe.experts import ExpertsSpec
from tedlab.spec import Layout, MicroBatch, Site, Sites, Spec, Work, WorkingSet


@dataclass(frozen=True)
class DroplessSpec(DispatchSpec):
    """Describes how tokens reach experts without a capacity: not at all, if each process holds all experts."""

    @override
    def obeyed(self, layout: Layout) -> Layout:
        if layout.degrees.expert > 1:
            return layout
        return replace(layout, options=replace(layout.options, dtd=False))  # no exchange, nothing to drop

    @override
    def sites(self, layout: Layout) -> Sites:
        if layout.degrees.expert > 1:
            return super().sites(layout)
        summed, gates = self._of_tokens()
        if not layout.sequence:
            return Sites((summed,), (replace(summed, tag="experts.copy"), *self._of_gates(gates)))
        summed = replace(summed, op="reduce_scatter", replicated=False)
        gathered = Site("dispatch.gather", "all_gather", "expert_tensor", self.hidden, replicated=True)
        gates = replace(gates, tag="dispatch.gather_gates", op="all_gather", replicated=True)
        chosen = replace(gates, tag="dispatch.gather_choices", dtype="index", recomputed=False)
        back = replace(summed, op="all_gather"), replace(gathered, op="reduce_scatter")
        return Sites((chosen, gathered, gates, summed), (*back, *self._of_gates(replace(gates, op="reduce_scatter"))))


@dataclass(frozen=True)
class LocalSpec(Spec):
    """Describes the work of :class:`tedlab.moe.LocalExperts`, with kernels on rows that pass over memory once.

    Attributes:
        experts: The experts, which state the parameters.
    """

    experts: ExpertsSpec

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        number, rows, inner, width = self.experts.here(b)
        total, hidden = b.rows.computed, self.experts.hidden
        if b.mixed:
            yield b.moved(number * hidden * (inner + width), b.parameter, b.compute)
        yield b.moved(2 * total * hidden)  # gathers tokens
        yield b.product(rows, hidden, inner, times=number)
        if "experts.reduce" in dead:
            return
        yield b.moved(total * (inner + width))  # bias and activation
        yield b.product(rows, width, hidden, times=number)
        yield b.moved((total + b.tokens) * hidden)  # weights and sums

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        number, rows, inner, width = self.experts.here(b)
        total, hidden = b.rows.computed, self.experts.hidden
        yield b.moved(2 * total * hidden)  # gathers gradients
        yield b.product(rows, hidden, width, times=number)
        yield b.moved(2 * total * (inner + width))  # of weight, activation and bias
        yield b.product(width, rows, hidden, times=number)
        yield b.moved(2 * total * hidden)  # gathers tokens again
        yield b.product(hidden, rows, inner, times=number)
        yield b.product(rows, inner, hidden, times=number)
        yield b.moved((total + b.tokens) * hidden)  # sums
        if self.experts.expert.bias:  # sums of rows, by products with an indicator of each row's expert
            yield b.product(number, total, inner)
            yield b.product(number, b.tokens, hidden)
            yield b.product(b.tokens, hidden, number)
        if b.mixed:
            yield b.moved(number * hidden * (inner + width), b.parameter, b.compute)

    def saved(self, b: MicroBatch) -> int:
        """Counts rows before their activation, indices, and tokens and weights if they are gathered or converted."""
        number, _, inner, width = self.experts.here(b)
        hidden = self.experts.hidden
        made = b.tokens * hidden * (b.mixed or b.layout.sequence) + number * hidden * (inner + width) * b.mixed
        return (b.rows.computed * inner + made) * b.compute.itemsize + 4 * b.rows.computed * torch.int64.itemsize

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        number, _, inner, width = self.experts.here(b)
        rows, hidden = b.rows.computed * b.compute.itemsize, self.experts.hidden
        down = number * hidden * width * b.parameter.itemsize
        up = number * hidden * inner * b.parameter.itemsize
        yield WorkingSet("activations of experts", temporaries=rows * (hidden + inner + 2 * width))
        yield WorkingSet("experts", new=down + up, temporaries=rows * (inner + hidden))
