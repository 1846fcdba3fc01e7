"""What experts without a capacity to which whole tokens come send, compute and keep: ``local.py`` and ``pilots.py``."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import torch
from typing_extensions import override

from tedlab.comm.rows import Rows
from tedlab.config import Dedup
from tedlab.moe.dispatch import DispatchSpec, adjoints, counting
from tedlab.moe.experts import ExpertsSpec
from tedlab.moe.grouped import native
from tedlab.moe.pilot_rows import PilotSenders, pilots_of, rows_of_gathered
from tedlab.registry import mixtures
from tedlab.spec import Layout, MicroBatch, Site, Sites, Spec, Work, WorkingSet


@dataclass(frozen=True)
class DroplessSpec(DispatchSpec):
    """Describes how tokens reach experts without a capacity: not at all, if each process holds all experts; otherwise
    as rows, or as pilots.
    """

    @override
    def obeyed(self, layout: Layout) -> Layout:
        if not self._alone(layout):
            return layout
        return replace(layout, options=replace(layout.options, dtd=False))  # no exchange, nothing to drop

    @override
    def sites(self, layout: Layout) -> Sites:
        if self.gathered(layout):
            return self._gathered_sites(layout)
        if self.pilots(layout):
            return self._pilot_sites(layout)
        if not self._alone(layout):
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

    def _alone(self, layout: Layout) -> bool:
        return mixtures[self.config.dispatch].alone(layout.degrees)

    @override
    def pilots(self, layout: Layout) -> bool:
        return layout.options.dedup != Dedup.NONE and layout.degrees.expert > 1

    @override
    def gathered(self, layout: Layout) -> bool:
        return layout.options.dedup == Dedup.GROUP and layout.degrees.expert > 1

    @override
    def rows(self, layout: Layout, tokens: int) -> Rows:
        if not self.pilots(layout):
            return super().rows(layout, tokens)
        tokens *= self.config.inputs
        sent_tx = pilots_of([1.0] * self.config.num_experts, tokens, self.config.top_k, layout)
        rows = PilotSenders(layout, 0).moved(sent_tx).rows
        return rows_of_gathered(layout, tokens, rows.computed) if self.gathered(layout) else rows

    def _gathered_sites(self, layout: Layout) -> Sites:
        tensor, hidden, twice, dealt, alike = (
            layout.degrees.tensor,
            self.hidden,
            layout.gathers > 1,
            layout.dealt,
            not layout.own,
        )
        together = not layout.degrees.folded
        summed, of_gates = self._of_tokens()
        whole = Site("combine.gather", "all_gather", "tensor", tensor * hidden, "dealt", replicated=True, feeds="end")
        to = Site("dispatch.all_gather", "all_gather", "expert", hidden, "sent", replicated=alike)
        gates = replace(to, tag="dispatch.all_gather_gates", width=self.choices, dtype="precise", replicated=alike)
        chosen = replace(gates, tag="dispatch.all_gather_choices", dtype="index", recomputed=False)
        back = replace(to, tag="combine.reduce_scatter", op="reduce_scatter")
        back = replace(back, feeds=summed.tag if alike else whole.tag if dealt else "end")
        spread = [
            replace(
                site,
                tag=site.tag.replace("all_gather", "gather"),
                kind="expert_tensor",
                rows="gathered",
                replicated=together,
            )
            for site in (chosen, to, gates)
        ]
        inside = replace(summed, op="reduce_scatter", rows="gathered", replicated=False, feeds=layout.returning)
        forward, backward, of_weights = [to], [replace(back, op="all_gather")], []
        if twice:
            forward = [replace(to, feeds=spread[1].tag), spread[1], chosen, spread[0]]
            forward += [replace(gates, feeds=spread[2].tag), spread[2], inside, back]
            backward += [replace(inside, op="all_gather"), replace(spread[1], op="reduce_scatter")]
            of_weights.append(replace(spread[2], op="reduce_scatter"))
        else:
            forward += [chosen, gates, back]
        backward.append(replace(to, op="reduce_scatter"))
        of_weights.append(replace(gates, op="reduce_scatter"))
        if alike:
            forward.append(summed)
            backward.append(replace(summed, tag="experts.copy"))
            of_weights.append(of_gates)
        elif dealt:
            forward.append(whole)
            backward.append(replace(whole, tag="dispatch.drop"))
            width = tensor * self.choices
            of_weights.append(replace(whole, tag="dispatch.drop_gates", width=width, dtype="precise"))
        return Sites(tuple(forward), (*backward, *self._of_gates(*of_weights)))

    def _pilot_sites(self, layout: Layout) -> Sites:
        tensor, gathered, dealt, alike = layout.degrees.tensor, layout.gathers > 1, layout.dealt, not layout.own
        experts, processes, nodes = self.config.num_experts, layout.degrees.expert, layout.nodes
        width = (experts + processes) // nodes
        counts = Site("dispatch.counts", "all_to_all", "expert", width, "once", "index", recomputed=False)
        of_all = replace(counts, tag="dispatch.gather_counts", op="all_gather", kind="expert_tensor")
        of_all = replace(of_all, width=layout.gathers * width)
        codes = Site("dispatch.choices", "all_to_all", "expert", 1, "choices_sent", "index", recomputed=False)
        of_all_codes = replace(
            codes, tag="dispatch.gather_choices", op="all_gather", kind="expert_tensor", rows="choices_gathered"
        )
        codes = replace(codes, result="choices_received")
        gates = replace(codes, tag="dispatch.gates", dtype="precise", recomputed=True)
        to = Site("dispatch.all_to_all", "all_to_all", "expert", self.hidden, "sent", result="received")
        back = replace(to, tag="combine.all_to_all", rows="received", result="sent")
        told = counting(counts, layout)
        if nodes > 1:  # nodes are also told of the choices of each process, and of pilots to it
            told[0] = replace(told[0], width=experts + processes + nodes)
        summed, of_gates = self._of_tokens()
        there = gates, replace(to, replicated=alike)
        together = not layout.degrees.folded  # then those that gather are a tensor group
        spread = Site("dispatch.gather", "all_gather", "expert_tensor", self.hidden, "gathered", replicated=together)
        spread_gates = replace(spread, tag="dispatch.gather_gates", width=1, rows="choices_gathered", dtype="precise")
        whole = Site("combine.gather", "all_gather", "tensor", tensor * self.hidden, "dealt", replicated=True)
        if gathered:
            told.append(of_all)
            there = replace(gates, feeds=spread_gates.tag), replace(to, feeds=spread.tag)
        back = replace(back, feeds=summed.tag if alike else whole.tag if dealt else "end")
        of_codes = codes.steps(layout, "choices_relayed", "choices_relayed")
        of_weights = there[0].steps(layout, "choices_relayed", "choices_relayed")
        out, home = (site.steps(layout, "relayed", "passed") for site in (there[1], back))
        # A process sends numbers, weights and rows to nodes before those that it passes on.
        on_their_way = (site for step in zip(of_codes, of_weights, out, strict=True) for site in step)
        back_again, weights_back, out_back = map(adjoints, (home, of_weights, out))
        forward, backward = (*told, *on_their_way), back_again
        if gathered:
            summed = replace(summed, op="reduce_scatter", rows="gathered", replicated=False, feeds=layout.returning)
            forward = *forward, of_all_codes, spread, spread_gates, summed
            backward = *backward, replace(summed, op="all_gather"), replace(spread, op="reduce_scatter")
            weights_back = replace(spread_gates, op="reduce_scatter"), *weights_back
        forward, backward = (*forward, *home), (*backward, *out_back)
        if alike:
            forward, backward = (*forward, summed), (*backward, replace(summed, tag="experts.copy"))
            weights_back = *weights_back, of_gates
        elif dealt:
            dropped = replace(whole, tag="dispatch.drop")
            forward, backward = (*forward, replace(whole, feeds="end")), (*backward, dropped)
            of_dropped = replace(dropped, tag="dispatch.drop_gates", width=tensor * self.choices, dtype="precise")
            weights_back = *weights_back, of_dropped
        return Sites(forward, (*backward, *self._of_gates(*weights_back)))


class Stages(NamedTuple):
    """The kernels of routed experts in one pass.

    Attributes:
        there: Those before tokens leave for experts, or gradients of results do.
        experts: Those between both exchanges.
        back: Those after what has come back.
    """

    there: list[Work]
    experts: list[Work]
    back: list[Work]

    def after(self, earlier: Iterable[Work]) -> "Stages":
        """Returns these kernels after others, before which nothing leaves."""
        return self._replace(there=[*earlier, *self.there])


@dataclass(frozen=True)
class LocalSpec(Spec):
    """Describes the work of :class:`tedlab.moe.LocalExperts`, with kernels on rows that pass over memory once.

    Where pilots are sent, they are the experts' tokens.

    Attributes:
        experts: The experts, which state the parameters.
        pilots: Whether pilots are sent.
        gathered: Whether tokens of others come, all of them.
    """

    experts: ExpertsSpec
    pilots: bool = False
    gathered: bool = False

    def tokens(self, b: MicroBatch) -> int:
        """Returns the number of the experts' tokens."""
        return b.rows.gathered if self.pilots or self.gathered else b.tokens

    def places(self, b: MicroBatch) -> int:
        """Returns the number of rows for which there is room; kernels skip those behind the last."""
        number, _, _, width = self.experts.here(b)
        roomy = self.gathered and not self.experts.expert.bias and native(b.compute, self.experts.hidden, width)
        return b.rows.gathered * min(self.experts.config.top_k, number) if roomy else b.rows.computed

    def _there(self, b: MicroBatch) -> Iterator[Work]:
        """Yields the kernels that copy tokens to pilots, or gradients of sums to those of pilots."""
        if self.pilots:
            yield b.moved(2 * b.rows.sent * self.experts.hidden)
            if b.layout.nodes > 1:
                yield b.moved(2 * b.rows.passed * self.experts.hidden)

    def _back(self, b: MicroBatch) -> Iterator[Work]:
        """Yields the kernels that sum the pilots of each token, or their gradients."""
        if self.pilots:
            if b.layout.nodes > 1:
                yield b.moved((b.rows.passed + b.rows.relayed) * self.experts.hidden)
            yield b.moved((b.rows.sent + b.outside) * self.experts.hidden)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        return chain(*self.stages(b, dead))

    def stages(self, b: MicroBatch, dead: Collection[str]) -> Stages:
        """Returns the kernels of :meth:`forward` by the exchanges between them."""
        number, rows, inner, width = self.experts.here(b)
        total, hidden = b.rows.computed, self.experts.hidden
        there = [b.moved(number * hidden * (inner + width), b.parameter, b.compute)] if b.mixed else []
        there += self._there(b)
        experts = [
            b.moved(2 * total * hidden, kernel="take"),  # tokens
            b.product(rows, hidden, inner, times=number, kernel=self.experts.grouped(b, inner)),
        ]
        alone = not (self.pilots or self.gathered)
        if ("experts.reduce" if alone or b.layout.gathers > 1 else b.layout.returning) in dead:
            return Stages(there, experts, [])
        experts += [
            b.moved(total * (inner + width), kernel="hidden"),  # bias and activation
            b.product(rows, width, hidden, times=number, kernel=self.experts.grouped(b, width)),
            b.moved((total + self.tokens(b)) * hidden, kernel="combine"),  # weights and sums
        ]
        return Stages(there, experts, [*self._back(b)])

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        return chain(*self.backward_stages(b))

    def backward_stages(self, b: MicroBatch) -> Stages:
        """Returns the kernels of :meth:`backward` by the exchanges between them."""
        number, rows, inner, width = self.experts.here(b)
        total, hidden, weights = b.rows.computed, self.experts.hidden, "grouped_weights"
        experts = [
            b.moved(2 * total * hidden, kernel="take"),  # gradients
            b.product(rows, hidden, width, times=number, kernel=self.experts.grouped(b, width)),
            b.moved(2 * total * (inner + width), kernel="hidden_backward"),  # of weight, activation and bias
            b.product(width, rows, hidden, times=number, kernel=self.experts.grouped(b, width, weights)),
            b.moved(2 * total * hidden, kernel="take"),  # tokens again
            b.product(hidden, rows, inner, times=number, kernel=self.experts.grouped(b, inner, weights)),
            b.product(rows, inner, hidden, times=number, kernel=self.experts.grouped(b, inner)),
            b.moved((total + self.tokens(b)) * hidden, kernel="combine"),  # sums
        ]
        back = [*self._back(b)]
        if self.experts.expert.bias:  # sums of rows, by products with an indicator of each row's expert
            back.append(b.product(number, total, inner))
            back.append(b.product(number, self.tokens(b), hidden))
            back.append(b.product(self.tokens(b), hidden, number))
        if b.mixed:
            back.append(b.moved(number * hidden * (inner + width), b.parameter, b.compute))
        return Stages([*self._there(b)], experts, back)

    def saved(self, b: MicroBatch) -> int:
        """Counts rows before their activation, indices, and tokens and weights if they are gathered or converted."""
        number, _, inner, width = self.experts.here(b)
        hidden = self.experts.hidden
        fresh = b.mixed or b.layout.sequence or self.pilots or self.gathered
        made = self.tokens(b) * hidden * fresh + number * hidden * (inner + width) * b.mixed
        rows = self.places(b)
        return (rows * inner + made) * b.compute.itemsize + 4 * rows * torch.int64.itemsize

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        number, _, inner, width = self.experts.here(b)
        rows, hidden = self.places(b) * b.compute.itemsize, self.experts.hidden
        down = number * hidden * width * b.parameter.itemsize
        up = number * hidden * inner * b.parameter.itemsize
        yield WorkingSet("activations of experts", temporaries=rows * (hidden + inner + 2 * width))
        yield WorkingSet("experts", new=down + up, temporaries=rows * (inner + hidden))
