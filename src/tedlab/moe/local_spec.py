"""What experts without a capacity that are all in one process do, see ``local.py``: their kernels and memory."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from tedlab.moe.experts import ExpertsSpec
from tedlab.spec import MicroBatch, Spec, Work, WorkingSet


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
        yield b.moved(total * (inner + width))  # bias and activation
        yield b.product(rows, width, hidden, times=number)
        yield b.moved((total + b.outside) * hidden)  # weights and sums

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
        yield b.moved((total + b.outside) * hidden)  # sums
        if self.experts.expert.bias:  # sums of rows, by products with an indicator of each row's expert
            yield b.product(number, total, inner)
            yield b.product(number, b.outside, hidden)
            yield b.product(b.outside, hidden, number)
        if b.mixed:
            yield b.moved(number * hidden * (inner + width), b.parameter, b.compute)

    def saved(self, b: MicroBatch) -> int:
        """Counts rows before their activation, indices, and tokens and weights if they are converted."""
        number, _, inner, width = self.experts.here(b)
        hidden = self.experts.hidden
        converted = (b.outside * hidden + number * hidden * (inner + width)) * b.mixed
        return (b.rows.computed * inner + converted) * b.compute.itemsize + 4 * b.rows.computed * torch.int64.itemsize

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        number, _, inner, width = self.experts.here(b)
        rows, hidden = b.rows.computed * b.compute.itemsize, self.experts.hidden
        down = number * hidden * width * b.parameter.itemsize
        up = number * hidden * inner * b.parameter.itemsize
        yield WorkingSet("activations of experts", temporaries=rows * (hidden + inner + 2 * width))
        yield WorkingSet("experts", new=down + up, temporaries=rows * (inner + hidden))
