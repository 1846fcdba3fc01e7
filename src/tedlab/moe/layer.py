"""The MoE layer: a router, the mixture of the experts that it chooses, and the experts that all tokens share."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tedlab.comm import Issued, gather_from, slice_to
from tedlab.config import MoEConfig, SharedCombine, SharedConfig, Shortcut
from tedlab.degrees import check_divides
from tedlab.moe.dispatch import DispatchSpec
from tedlab.moe.experts import Experts, ExpertsSpec, mixtures
from tedlab.moe.local_spec import LocalSpec, Stages
from tedlab.moe.router import RouterReport, RouterSpec, Routing, routers
from tedlab.moe.shared import Beside, SharedExperts, SharedSpec
from tedlab.nn import FeedForwardSpec
from tedlab.spec import Layout, MicroBatch, Site, Sites, Spec, Work, WorkingSet
from tedlab.topology import Topology


@dataclass(frozen=True)
class MoESpec(Spec):
    """Describes a :class:`MoELayer`.

    Attributes:
        expert: A feed-forward layer like each of the experts. The router has the initial weights of its first product.
        config: Experts, gating, choices, and capacity if any.
    """

    parts = ("router", "dispatch", "experts", "shared")
    expert: FeedForwardSpec
    config: MoEConfig

    @property
    def hidden(self) -> int:
        return self.expert.hidden

    @property
    def router(self) -> RouterSpec:
        return routers[self.config.gating].spec(self.hidden, self.config, self.expert.init)

    @property
    def dispatch(self) -> DispatchSpec:
        return mixtures[self.config.dispatch].dispatch(self.hidden, self.config)

    @property
    def experts(self) -> ExpertsSpec:
        return ExpertsSpec(self.expert, self.config)

    def slices(self, layout: Layout) -> bool:
        """Tells whether the layer itself slices the tokens, which nothing has divided before."""
        return self.config.sliced and not layout.sequence and layout.degrees.tensor > 1

    def inside(self, layout: Layout) -> Layout:
        """Returns the layout as the router and routed experts see it."""
        return layout.inside(self.config)

    def within(self, b: MicroBatch) -> MicroBatch:
        """Returns what the router and routed experts compute with.

        Neither their kernels nor those of shared experts are counted as compiled: experts that take rows are left out
        of what is; of the kernels of others a compiler makes fewer.
        """
        inside = replace(b, compiled=False)
        return replace(inside, layout=self.inside(b.layout)) if self.slices(b.layout) else inside

    def _sliced(self, b: MicroBatch) -> Iterator[Work]:
        """Yields the kernels that slice tokens and restore them, or their gradients."""
        if self.slices(b.layout):
            yield b.moved(2 * self.within(b).outside * self.hidden, b.parameter)
            yield b.moved(2 * b.outside * self.hidden)

    def local(self, b: MicroBatch) -> LocalSpec | None:
        """Returns what experts do to which whole tokens come, or their pilots, if these are such."""
        whole, gathered = self.dispatch.pilots(b.layout), self.dispatch.gathered(b.layout)
        alone = mixtures[self.config.dispatch].alone(b.layout.degrees)
        return LocalSpec(self.experts, whole and not gathered, gathered) if alone or whole else None

    @property
    def shared(self) -> SharedSpec | None:
        """The experts that every token goes to, if there are any."""
        shared = self.config.shared
        if not shared.experts:
            return None
        layer = {field.name: getattr(self.expert, field.name) for field in fields(self.expert)}
        width = shared.experts * (shared.ffn or self.expert.ffn)
        return SharedSpec(**{**layer, "ffn": width, "tag": "shared"}, combine=shared.combine)

    @property
    def routed_alone(self) -> "MoESpec":
        """The same layer without shared experts."""
        return replace(self, config=replace(self.config, shared=SharedConfig()))

    def read_twice(self, b: MicroBatch) -> int:
        """Returns the bytes of the tokens that the router and a dense layer keep, if these can be the same."""
        twice = self.shared is not None and not b.mixed and not self.inside(b.layout).sequence
        return b.tokens * self.hidden * b.compute.itemsize if twice else 0

    def sites(self, layout: Layout) -> Sites:
        shared = Sites() if self.shared is None else self.shared.sites(layout)
        forward, backward = self._routed_sites(layout).then(shared)
        if self.config.shared.combine != SharedCombine.CG2:
            return Sites(forward, backward)
        # The gradients of both weights need both results, which otherwise nothing reads again.
        return Sites(tuple(replace(s, feeds=None) if s.feeds == "end" else s for s in forward), backward)

    def _routed_sites(self, layout: Layout) -> Sites:
        inside, together = self.inside(layout), Sites()
        for part in (self.router, self.dispatch, self.experts):
            together = together.then(part.sites(inside))
        if not self.slices(layout):
            return together
        whole = Site("slice.gather", "all_gather", "tensor", self.hidden, replicated=True, feeds="end")
        dropped = Sites((), (replace(whole, tag="slice.drop", feeds=None),))
        return dropped.then(together).then(Sites((whole,)))

    def flops(self, length: int) -> Counter[str]:
        """Counts the experts that a token chooses, even if a full one drops it, and no empty slots."""
        routed = self.router.flops(length) + Counter(experts=self.config.top_k * self.experts.flops(length).total())
        routed = Counter({name: self.config.inputs * flops for name, flops in routed.items()})
        return routed if self.shared is None else routed + self.shared.flops(length)

    @property
    def summed_again(self) -> bool:
        """Whether something that is computed again comes after the sum of a token's choices, or keeps it."""
        if self.shared is None:
            return False
        return self.config.shortcut == Shortcut.NONE or self.config.shared.combine == SharedCombine.CG2

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        yield from self._sliced(b)
        yield from chain(*self.stages(self.within(b), dead, stop))
        if self.shared is not None:
            yield from self.shared.forward(replace(b, compiled=False), dead, stop)
            if not stop:
                yield b.moved(3 * b.outside * self.hidden)

    def stages(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Stages:
        """Returns the kernels of the router and of routed experts in a forward pass, by the exchanges between them.

        Args:
            b: What they compute with, see :meth:`within`.
            dead, stop: See :meth:`forward`.
        """
        chosen = b.outside * self.dispatch.choices
        there = [*self.router.forward(b)]
        if b.mixed:
            there.append(b.moved(b.outside * self.hidden, b.parameter, b.compute))
        local = self.local(b)
        if local is not None:
            return local.stages(b, dead).after(there)
        there += self.dispatch.there(b)
        experts = [*self.experts.forward(b, stop=self.dispatch.fed(b.layout) in dead)]
        back = [*self.dispatch.back(b, bias=self.expert.bias)]
        if self.summed_again or not stop:
            fused = self.dispatch.fused(b)
            if not fused:
                back.append(b.moved(2 * chosen * self.hidden))  # gate
            back.append(b.moved((chosen + b.outside) * self.hidden, kernel="combine" if fused else None))
        return Stages(there, experts, back)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        if self.shared is not None:
            yield from self.shared.backward(replace(b, compiled=False))
            yield b.moved(3 * b.outside * self.hidden, b.parameter)  # adds the gradients of tokens
        yield from self._sliced(b)
        yield from chain(*self.backward_stages(self.within(b)))

    def backward_stages(self, b: MicroBatch) -> Stages:
        """Returns the kernels of :meth:`stages` in the backward pass, in which gradients travel the other way."""
        chosen, local = b.outside * self.dispatch.choices, self.local(b)
        if local is not None:
            stages = local.backward_stages(b)
        else:
            fused = self.dispatch.fused(b)
            there = [b.moved(passes * chosen * self.hidden) for passes in (() if fused else (3, 2, 1))]  # of the gate
            there += self.dispatch.there(b, backward=True)
            back = [*self.dispatch.back(b, bias=False, backward=True)]
            sums = chosen + b.outside if fused else 3 * (self.dispatch.choices - 1) * b.outside
            back.append(b.moved(sums * self.hidden, kernel="combine" if fused else None))
            stages = Stages(there, [*self.experts.backward(b)], back)
        both = b.moved(3 * b.outside * self.hidden, b.parameter)  # adds the router's and the experts' gradients
        return stages._replace(back=[*stages.back, *self.router.backward(b), both])

    def saved(self, b: MicroBatch) -> int:
        """Adds the results that gates weight.

        The router keeps the same tokens as shared experts or, with a shortcut, as the dense layer that reads them.
        """
        shared = 0 if self.shared is None else self.shared.saved(b)
        shared -= self.read_twice(b)
        b = self.within(b)
        local = self.local(b)
        if local is not None:
            return self.router.saved(b) + local.saved(b) + shared
        routed = sum(part.saved(b) for part in (self.router, self.dispatch, self.experts))
        return routed + self._weighted(b) + shared

    def saved_later(self, b: MicroBatch, arrived: bool) -> int:
        """Returns the bytes that routed experts save once tokens have arrived or, if they have, once results have."""
        within = self.within(b)
        local = self.local(within)
        if local is not None:
            return 0 if arrived else local.saved(within)
        return self._weighted(b) + (0 if arrived else self.experts.saved(within))

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        local = self.local(self.within(b))
        if local is not None:
            yield from self._local_working_sets(local, b, recomputed)
            return
        here, _, inner, width = self.experts.here(b)
        slots, stream = b.rows.computed * b.compute.itemsize, b.outside * self.hidden * b.parameter.itemsize
        # The results that gates weighted are freed, and the gradient of tokens is still only the block result's.
        matrix = here * self.hidden * width * b.parameter.itemsize
        held = slots * (self.hidden + inner) - stream
        # The gradients of borrowed experts, then these in one tensor.
        held += 2 * b.rows.borrowed * self.experts.elements(b.layout.degrees) * b.compute.itemsize
        experts = WorkingSet("experts", matrix, freed=self._weighted(b), temporaries=held)
        if self.shared is not None:  # their backward pass is the first
            yield from self.shared.working_sets(b, recomputed)
            gradient = b.outside * self.hidden * b.parameter.itemsize
            experts = experts._replace(
                done=self.shared.gradients(b),
                freed=experts.freed + self.shared.saved(b),
                temporaries=experts.temporaries + gradient,
            )
        yield experts
        if self.dispatch.choices > self.config.top_k:  # more room than results: gradients of both factors of each
            yield WorkingSet("gates", temporaries=2 * self._weighted(b))
        if recomputed and self.config.ragged:
            # Product; sum with the bias; if tensor ranks share rows, also rows as received, and parts in that order.
            layout = self.dispatch.obeyed(self.inside(b.layout))
            copies = 1 + self.expert.bias + (layout.gathers > 1) + layout.scattered
            yield WorkingSet("end of recomputing", temporaries=copies * slots * self.hidden - stream)

    def _local_working_sets(self, local: LocalSpec, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        done = freed = 0
        if self.shared is not None:
            yield from self.shared.working_sets(b, recomputed)
            done, freed = self.shared.gradients(b), self.shared.saved(b)
        for moment in local.working_sets(b, recomputed):
            yield moment._replace(done=done, freed=freed)

    def _weighted(self, b: MicroBatch) -> int:
        return self.within(b).outside * self.dispatch.choices * self.hidden * b.compute.itemsize


class Underway(NamedTuple):
    """Tokens between two phases of :class:`MoELayer`.

    Attributes:
        routing: Where they go.
        x_TH: The tokens that this process routes. Router and experts take the same tensor: so gradients of tokens are
            added in one order, whether exchanges overlap or not.
        length: How many positions of a sample it routes.
        sent: What is on its way to experts, see :meth:`tedlab.moe.Experts.start` and ``send``; None: nothing has been
            sent.
    """

    routing: Routing
    x_TH: Tensor
    length: int
    sent: list[Issued[Any]] | None


class MoELayer(nn.Module):
    """A router and experts in place of a feed-forward layer (paper §2), and experts that all tokens share, if any."""

    def __init__(self, spec: MoESpec, topology: Topology) -> None:
        super().__init__()
        inside = topology.sliced() if spec.config.sliced else topology
        self.router = routers[spec.config.gating](spec.router, inside)
        self.experts: Experts = mixtures[spec.config.dispatch].make(spec.experts, inside)
        self.comm = topology.comm
        self.slices = topology.degrees.tensor if spec.config.sliced and not topology.sequence_sharded else 1
        self.shared = None if spec.shared is None else SharedExperts(spec.shared, topology)
        self.overlap = topology.options.overlap_shared or topology.options.overlap_shortcut

    def expect(self, x: Tensor) -> None:
        """Checks before a forward pass that the layer's collectives will fit those of other processes.

        :meth:`forward` does this itself unless it is compiled.

        Raises:
            ValueError: If processes of an expert group have unequal numbers of tokens and experts have a capacity.
        """
        tokens = x.shape[0] * x.shape[1] // self.slices
        self.experts.expect(tokens, self.router.capacity(tokens))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, RouterReport]:
        """Maps activations (B, S, H) to (B, S, H), with S as on this tensor rank, and reports what the router did.

        Shared experts may compute while tokens are on their way to routed ones and back.

        Args:
            x: Activations.
            padding_mask: (B, S) bool, True for padding (as torch's ``key_padding_mask``): it takes no slot, counts in
                no loss or statistic, and gets nothing from experts but from shared ones, which take it like any dense
                layer. None: there is no padding.

        Raises:
            ValueError: If the mask has another shape or dtype, or if the gating is DeepSpeed's, which knows no padding.
        """
        tokens, shared = self.begin(x, padding_mask), self.shared
        if shared is None:
            return self.compute(tokens).wait().view_as(x), tokens.routing.report
        if tokens.sent is None or not self.overlap:
            return self.join(self.compute(tokens).wait().view_as(x), shared.beside(x)), tokens.routing.report
        hidden = shared.first(x)
        back = self.compute(tokens)
        beside = shared.finish(hidden, x)
        return self.join(back.wait().view_as(x), beside), tokens.routing.report

    def begin(self, x: Tensor, padding_mask: Tensor | None = None) -> Underway:
        """Routes tokens and, if exchanges overlap, sends them to their experts.

        Arguments and exceptions are those of :meth:`forward`.
        """
        padding_T = None
        if padding_mask is not None:
            if padding_mask.dtype is not torch.bool or padding_mask.shape != x.shape[:2]:
                raise ValueError(
                    f"padding_mask is {padding_mask.dtype} {tuple(padding_mask.shape)}; it must be torch.bool "
                    f"{tuple(x.shape[:2])}, True where there is padding"
                )
            if self.slices > 1:
                padding_mask = padding_mask.chunk(self.slices, 1)[self.comm.rank("tensor")]
            padding_T = padding_mask.flatten()
        if not torch.compiler.is_compiling():
            self.expect(x)
        if self.slices > 1:
            check_divides("the number of positions", x.shape[1], "the tensor degree", self.slices)
            x = slice_to(x, self.comm, "tensor", "slice.drop", dim=1)
        x_TH = x.flatten(0, 1)
        sent = self.experts.start(x_TH)
        routing = self.router(x_TH, x.shape[1], padding_T)
        if sent is None and self.overlap:
            sent = self.experts.send(x_TH, routing)
        return Underway(routing, x_TH, x.shape[1], sent)

    def compute(self, tokens: Underway) -> Issued[Tensor]:
        """Computes what experts make of their tokens, and returns the sums of each token's results, on their way."""
        if tokens.sent is None:
            back = Issued.arrived(self.experts(tokens.x_TH, tokens.routing))
        else:
            back = self.experts.answer(tokens.sent, tokens.routing)
        if self.slices == 1:
            return back
        samples = -1, tokens.length
        return back.then(
            lambda y_TH: gather_from(y_TH.unflatten(0, samples), self.comm, "tensor", "slice.gather", dim=1)
        )

    def join(self, y: Tensor, beside: Beside) -> Tensor:
        """Adds the shared experts' results to those of the routed ones, both (B, S, H)."""
        return (y if beside.weight is None else y * beside.weight) + beside.y
