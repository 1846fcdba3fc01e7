"""Token paths: how tokens reach their experts and how results come back. ``ragged.py`` has those without a capacity.

A token path has two methods, ``dispatch`` and ``combine``, which map between a token's place in the micro-batch and its
slot at an expert. A slot region has two, ``enter`` and ``leave``, which map between the slots of one tensor rank and
those that an expert sees. Neither knows the weights of routers and experts. Together they make the modes of the paper
(§5.1) and of sequence parallelism:

=================  ====================  ====================================================================
mode               path and region       what is sent (forward)
=================  ====================  ====================================================================
plain TED          all-to-all,           every tensor rank exchanges every slot, all-reduce of the results
                   replicated slots
DTD                dropping,             each exchanges 1/T of the slots; all-gather; all-reduce, of which 1/T
                   gathered slots        goes back; all-gather
DTD, fused         dropping,             the same with a reduce-scatter for all-reduce and drop
                   scattered slots
sequence parallel  all-to-all,           each tensor rank has its own tokens, so there is nothing to drop
                   scattered slots
folded (T_e ≠ T)   as DTD, or as with    the same, but what was received is gathered, and results are reduced, in
                   sequence parallelism  the expert_tensor group: not at all if T_e = 1
=================  ====================  ====================================================================

With T = 1, nobody drops anything; a folded layout then gathers the slots of T_e data ranks, like those of tensor ranks
in sequence parallelism.

Legend as in ``router.py``, and e: experts of this process (E / E_p), N = E_p·C (T_e·E_p·C / T if gathered): slots of
one expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from tedlab.capacity import group_capacity
from tedlab.comm import (
    Collectives,
    Issued,
    copy_to,
    gather_from,
    gather_to,
    reduce_from,
    route,
    scatter_from,
    slice_to,
)
from tedlab.comm.rows import Rows, hands, rows_of, split_evenly, spread
from tedlab.config import ExpertKernel, LendPolicy, MoEConfig
from tedlab.moe.gather import grown, merge_choices, spread_choices
from tedlab.moe.router import Routing, routers
from tedlab.spec import Layout, MicroBatch, Site, Sites, Spec, Work
from tedlab.topology import Topology


@dataclass(frozen=True)
class DispatchSpec(Spec):
    """Describes a token path and its region, with slots or with rows."""

    hidden: int
    config: MoEConfig

    @property
    def choices(self) -> int:
        """The number of choices for which a token has room."""
        return routers[self.config.gating].choices(self.config)

    def obeyed(self, layout: Layout) -> Layout:
        """Returns the layout with the toggles as the path obeys them: one without DTD, say, switches ``dtd`` off."""
        return layout

    def chunks(self, layout: Layout) -> int:
        """Returns into how many chunks it divides what processes exchange."""
        return layout.chunks

    def most_chunks(self, layout: Layout, tokens: int) -> int:
        """Returns into how many chunks what a process sends for a data rank's micro-batch can be divided at most."""
        sent = self.rows(layout, tokens).sent
        return sent if self.config.ragged else sent // self.config.num_experts

    def sites(self, layout: Layout) -> Sites:
        layout = self.obeyed(layout)
        gathered, scattered, dealt, hidden = layout.gathers > 1, layout.scattered, layout.dealt, self.hidden
        # Tensor ranks hold the same results where they exchange the same, or are those that gather.
        alike, together, parts = not layout.own, not layout.degrees.folded, self.chunks(layout)
        to = Site("dispatch.all_to_all", "all_to_all", "expert", hidden, "sent", result="received", parts=parts)
        back = Site("combine.all_to_all", "all_to_all", "expert", hidden, "received", result="sent", parts=parts)
        spread = Site(
            "dispatch.gather", "all_gather", "expert_tensor", hidden, "gathered", replicated=together, parts=parts
        )
        summed = replace(spread, tag="experts.reduce", op="all_reduce", rows="computed")
        whole = Site("combine.gather", "all_gather", "tensor", hidden * layout.deals, "sent", replicated=True)
        if self.config.ragged and alike:
            return self._partial_rows(layout, replace(to, replicated=True), back)
        back = replace(back, feeds=whole.tag if dealt else None, replicated=alike)
        if scattered:
            summed = replace(summed, op="reduce_scatter", rows="gathered", replicated=False)
        forward = [
            *self._counts(layout),
            *replace(to, feeds=spread.tag if gathered else None, replicated=alike).steps(layout),
            *([spread] if gathered else []),
            replace(summed, feeds=layout.returning),
            *back.steps(layout),
            *([whole] if dealt else []),
        ]
        if scattered:
            inside = [replace(summed, op="all_gather"), replace(spread, op="reduce_scatter")]
        else:
            inside = [replace(spread, tag="combine.drop")] if gathered else []
            inside.append(replace(summed, tag="experts.copy"))
        dropped = [replace(whole, tag="dispatch.drop")] if dealt else []
        # Gradients take the path of the rows in reverse.
        return Sites(tuple(forward), (*adjoints(back.steps(layout)), *inside, *adjoints(to.steps(layout)), *dropped))

    def _partial_rows(self, layout: Layout, to: Site, back: Site) -> Sites:
        """Returns the collectives if rows come back as partial results, of which each token's sums are reduced."""
        summed, gates = self._of_tokens()
        return Sites(
            (*self._counts(layout), *to.steps(layout), *back.steps(layout), summed),
            (
                *self._of_gates(gates),
                *adjoints(back.steps(layout)),
                *adjoints(to.steps(layout)),
                replace(summed, tag="experts.copy"),
            ),
        )

    def _of_tokens(self) -> tuple[Site, Site]:
        """Returns the reduction of tokens' partial sums, which nothing but the residual reads, and of their weights."""
        summed = Site("experts.reduce", "all_reduce", "expert_tensor", self.hidden, replicated=True, feeds="end")
        return summed, Site("experts.copy_gates", "all_reduce", "expert_tensor", self.choices, dtype="precise")

    def pilots(self, layout: Layout) -> bool:
        """Tells whether whole tokens travel: as pilots, see :mod:`tedlab.moe.pilots`, or to all processes."""
        return False

    def gathered(self, layout: Layout) -> bool:
        """Tells whether every token comes to all processes of an expert group, see :mod:`tedlab.moe.gathered`."""
        return False

    def fed(self, layout: Layout) -> str:
        """Returns the tag of the collective that experts' results feed."""
        partial = self.config.ragged and self.obeyed(layout).gathers == 1
        return layout.returning if partial else "experts.reduce"

    def _of_gates(self, *sites: Site) -> tuple[Site, ...]:
        """Returns the sites of gradients of weights; none if weights have no gradients."""
        return sites if routers[self.config.gating].weights_learn else ()

    def _counts(self, layout: Layout) -> list[Site]:
        """Returns the collectives that exchange numbers of rows if there is no capacity; recomputation skips them."""
        if not self.config.ragged:
            return []
        experts = self.config.num_experts
        if self.config.lend.policy != LendPolicy.NONE and layout.degrees.expert > 1:  # all plan, with the lists of all
            experts *= layout.degrees.expert
            all_lists = Site("dispatch.counts", "all_gather", "expert", experts, "once", "index", recomputed=False)
            gathered = replace(all_lists, tag="dispatch.gather_counts", kind="expert_tensor")
            return [all_lists, replace(gathered, width=layout.gathers * experts)] if layout.sequence else [all_lists]
        own = Site("dispatch.counts", "all_to_all", "expert", experts, "once", "index", recomputed=False)
        steps = counting(own, layout)
        width = layout.gathers * experts
        all_ranks = replace(own, tag="dispatch.gather_counts", op="all_gather", kind="expert_tensor", width=width)
        return [*steps, all_ranks] if layout.gathers > 1 else steps

    def rows(self, layout: Layout, tokens: int) -> Rows:
        """Returns the rows that the first process moves for a data rank's micro-batch; all slots count as rows.

        Where routers decide how many there are, this assumes that all experts are chosen equally often.
        """
        moe, degrees, layout = self.config, layout.degrees, self.obeyed(layout)
        tokens *= moe.inputs
        if moe.ragged:
            counts = self.taken(spread([1.0] * moe.num_experts, tokens * moe.top_k, tokens), layout, tokens)
            of_ranks = hands(counts[None], layout.deals)[:, 0]  # what each of the tensor ranks sends
            here = slice(moe.num_experts // degrees.expert)
            arriving = [
                [of_ranks[degrees.coordinates(sender)["tensor"] % layout.deals, here] for sender in senders]
                for senders in degrees.senders(0)[: layout.gathers]
            ]
            rows = rows_of(np.array(arriving), int(of_ranks[0].sum()), 0, self.chunks(layout))
            if layout.nodes == 1:
                return rows
            # Those that the first process of each node sends to the experts of the first node.
            first = [degrees.coordinates(sender)["tensor"] for sender in degrees.senders(0)[0]]
            of_node = [of_ranks[rank % layout.deals, : moe.num_experts // layout.nodes].sum() for rank in first]
            return replace(rows, relayed=int(sum(of_node[:: degrees.expert // layout.nodes])))
        slots = -(-self.capacity(layout, tokens) // layout.deals) * moe.num_experts  # padded: as many for each
        gathered = layout.gathers * slots
        return Rows(slots, slots, gathered, gathered, relayed=slots if layout.nodes > 1 else 0)

    def capacity(self, layout: Layout, tokens: int) -> int:
        """Returns the slots that each expert offers to a data rank's micro-batch, if their number is limited."""
        groups = self.config.capacity_groups or (layout.degrees.tensor if layout.sequence else 1)
        return groups * group_capacity(self.config, tokens // groups, groups)

    def taken(self, counts_E: np.ndarray, layout: Layout, tokens: int) -> np.ndarray:
        """Returns how many of a data rank's choices of each expert are sent."""
        return counts_E if self.config.unlimited else np.minimum(counts_E, self.capacity(layout, tokens))

    def there(self, b: MicroBatch, backward: bool = False) -> Iterator[Work]:
        """Yields the kernels of tokens on their way to experts, or in the backward pass of the gradients of results."""
        layout, width = self.obeyed(b.layout), self.hidden
        if backward and self.fused(b):  # the kernel that gathers gradients also reads results, for the gates' gradients
            yield b.moved(3 * self.merged(b) * width, kernel="combine_backward")
        else:
            yield from self._indexed(b, self.merged(b))
        if layout.dealt:
            yield b.moved(2 * b.rows.sent * width)
        if self.chunks(b.layout) > 1 and not self.config.ragged:  # rows lie by chunk
            yield b.moved(2 * b.rows.sent * width)
        yield from self._turned(b)
        if self._reordered(b):
            yield b.moved(2 * b.rows.sent * width, kernel=self._gathering(b, backward))
        if layout.gathers > 1:
            yield b.moved(2 * b.rows.computed * width)

    def back(self, b: MicroBatch, bias: bool, backward: bool = False) -> Iterator[Work]:
        """Yields the kernels that bring back results, with their bias if any, or gradients, which have none."""
        layout, width = self.obeyed(b.layout), self.hidden
        gathered, scattered = layout.gathers > 1, layout.scattered
        if scattered:
            yield b.moved(2 * b.rows.computed * width)  # orders rows by receiver
        if bias:
            yield b.moved(2 * (b.rows.sent if scattered else b.rows.computed) * width)
        if gathered and not scattered:
            yield b.moved(2 * b.rows.sent * width)
        if self._reordered(b):
            yield b.moved(2 * b.rows.sent * width, kernel=self._gathering(b, backward))
        yield from self._turned(b)
        if self.chunks(b.layout) > 1:
            yield b.moved(2 * b.rows.sent * width)
        if layout.dealt:
            yield b.moved(2 * self.merged(b) * width)
        if not self.fused(b):  # otherwise sums of choices read rows by index
            yield from self._indexed(b, b.outside * self.choices)

    def fused(self, b: MicroBatch) -> bool:
        """Tells whether kernels gather, activate and weight rows; slots only have them if they are asked for."""
        return b.fused and (self.config.ragged or self.config.kernel == ExpertKernel.TRITON)

    def merged(self, b: MicroBatch) -> int:
        """Returns the rows from which this process makes its tokens' sums."""
        layout = self.obeyed(b.layout)
        if layout.degrees.folded:
            return b.rows.sent * (layout.deals if layout.dealt else 1)
        return b.rows.sent if layout.sequence else b.rows.computed

    def saved(self, b: MicroBatch) -> int:
        """Counts the indices of choices and of slots."""
        return (4 * b.outside * self.choices + 2 * b.rows.computed) * torch.int64.itemsize

    def _indexed(self, b: MicroBatch, rows: int) -> Iterator[Work]:
        """Yields the kernels that gather rows by index and fill missing ones with zeros."""
        for _ in range(1 if self.fused(b) else 2):
            yield b.moved(2 * rows * self.hidden, kernel=self._gathering(b))

    def _gathering(self, b: MicroBatch, backward: bool = False) -> str | None:
        """Returns the kernel that gathers rows, whose gradients are sums of what they were copied to."""
        return ("combine" if backward else "take") if self.fused(b) else None

    def _turned(self, b: MicroBatch) -> Iterator[Work]:
        """Yields the kernels that sort rows on their way by nodes, before and after they are exchanged inside one."""
        if b.layout.nodes > 1:
            yield b.moved(2 * b.rows.relayed * self.hidden)
            yield b.moved(2 * b.rows.received * self.hidden)

    def _reordered(self, b: MicroBatch) -> bool:
        """Tells whether rows that arrive by sender must be sorted by expert."""
        return self.config.num_experts > b.layout.degrees.expert > 1


def adjoints(steps: tuple[Site, ...]) -> tuple[Site, ...]:
    """Returns the exchanges of the gradients of some exchanges, in their order."""
    return tuple(step.adjoint for step in reversed(steps))


def counting(site: Site, layout: Layout) -> list[Site]:
    """Returns the exchanges of numbers of rows: two if rows go by way of nodes."""
    if layout.nodes == 1:
        return [site]
    return [
        replace(site, tag="dispatch.counts_between_nodes", kind="expert_between_nodes"),
        replace(site, tag="dispatch.counts_in_node", kind="expert_in_node"),
    ]


class TokenPath(Protocol):
    """Moves tokens to slots, and results back."""

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Sends this rank's tokens (T, H) and returns the slots of its experts (e, N, H); empty slots hold zeros."""
        ...

    def combine(self, y_eNH: Tensor, routing: Routing) -> Tensor:
        """Sends experts' results (e, N, H) back and returns each token's gate-weighted sum of its choices (T, H)."""
        ...


@runtime_checkable
class OverlappingPath(TokenPath, Protocol):
    """A token path in parts, between which exchanges are under way and others may compute."""

    def send(self, x_TH: Tensor, routing: Routing) -> list[Issued[Tensor]]:
        """Begins a :meth:`dispatch`. What arrives are the slots in one or several chunks (e, n, H), to compute each."""
        ...

    def answer(self, y_enH: Tensor) -> Issued[Tensor]:
        """Begins to send a chunk's results (e, n, H) back."""
        ...

    def receive(self, back: list[Tensor], routing: Routing) -> Tensor:
        """Returns what :meth:`combine` does, of the chunks that came back, in their order."""
        ...


class AllToAllPath:
    """Exchanges the slots of all this process's tokens within its expert group.

    Tokens are moved by index, never by multiplication with a one-hot mask.

    Args:
        num_experts: Number of experts E, a multiple of the expert degree.
        topology: The process's place in the meshes.
        kernel: What copies tokens to slots and sums them, ``torch`` or ``triton``.
    """

    def __init__(self, num_experts: int, topology: Topology, kernel: str = "torch") -> None:
        self.comm, self.agreement = topology.comm, topology.slots
        self.num_experts, self.kernel, self.chunks = num_experts, kernel, topology.layout.chunks
        self.ranks, self.route = self.comm.size("expert"), route(self.comm)

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Tensor:
        return self._to_experts(self._own(self._slots(x_TH, routing))).wait()

    def combine(self, y_eNH: Tensor, routing: Routing) -> Tensor:
        return self.receive([self.answer(y_eNH).wait()], routing)

    def send(self, x_TH: Tensor, routing: Routing) -> list[Issued[Tensor]]:
        x_ECH = self._own(self._slots(x_TH, routing))
        number = min(self.chunks, x_ECH.shape[1])
        chunks = [x_ECH] if number == 1 else x_ECH.split(split_evenly(x_ECH.shape[1], number), 1)
        return [self._to_experts(chunk) for chunk in chunks]

    def answer(self, y_enH: Tensor) -> Issued[Tensor]:
        return self._from_experts(y_enH)

    def receive(self, back: list[Tensor], routing: Routing) -> Tensor:
        y_ECH = back[0] if len(back) == 1 else torch.cat(back, 1)
        return self._tokens(self._whole(y_ECH), routing)

    def _own(self, x_ECH: Tensor) -> Tensor:
        """Returns the slots that this tensor rank sends."""
        return x_ECH

    def _whole(self, y_ECH: Tensor) -> Tensor:
        """Inverts :meth:`_own`."""
        return y_ECH

    def _slots(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Copies tokens to their slots (E, C, H), with the C that all processes agree on."""
        x_ECH = spread_choices(x_TH, routing, self.kernel).unflatten(0, (self.num_experts, -1))
        return grown(x_ECH, self.agreement.largest(x_ECH.shape[1]))

    def _to_experts(self, x_ECH: Tensor) -> Issued[Tensor]:
        def by_expert(x: Tensor) -> Tensor:
            return x.unflatten(0, (self.ranks, -1)).transpose(0, 1).flatten(1, 2)  # (E_p senders, e, C, H) → (e, N, H)

        return self.route.there(x_ECH).then(by_expert)

    def _from_experts(self, y_eNH: Tensor) -> Issued[Tensor]:
        y = y_eNH.unflatten(1, (self.ranks, -1)).transpose(0, 1).flatten(0, 1)  # (E_p receivers · e, C, H)
        return self.route.back(y)  # (E, C, H)

    def _tokens(self, y_ECH: Tensor, routing: Routing) -> Tensor:
        own = len(routing.choice_EC) // self.num_experts
        return merge_choices(y_ECH[:, :own].flatten(0, 1), routing, self.kernel)


class DroppingPath(AllToAllPath):
    """Duplicate token dropping (paper §5.1): all tensor ranks hold the same slots, and each exchanges 1/T of them.

    Rank i takes the i-th of T slices of every expert's slots. If T does not divide the capacity, the buffer is padded
    with empty slots, so DTD drops no tokens that would otherwise be kept.
    """

    def _own(self, x_ECH: Tensor) -> Tensor:
        tensor = self.comm.size("tensor")
        x_ECH = grown(x_ECH, -(-x_ECH.shape[1] // tensor) * tensor)
        return slice_to(x_ECH, self.comm, "tensor", "dispatch.drop", dim=1)

    def _whole(self, y_ECH: Tensor) -> Tensor:
        return gather_from(y_ECH, self.comm, "tensor", "combine.gather", dim=1)


class SlotRegion(Protocol):
    """The entry and exit of the computation that an expert_tensor group divides."""

    def enter(self, x_eNH: Tensor) -> Tensor:
        """Maps the slots that this process received to slots of which every process of the group computes its part."""
        ...

    def leave(self, partial_eNH: Tensor, bias_e1H: Tensor | None) -> Tensor:
        """Sums the group's parts, adds a bias if given, and returns the slots that this process sends back."""
        ...


class ReplicatedSlots:
    """Every process that divides an expert receives the same slots, or there is one such process."""

    def __init__(self, comm: Collectives) -> None:
        self.comm = comm

    def enter(self, x_eNH: Tensor) -> Tensor:
        return copy_to(x_eNH, self.comm, "expert_tensor", "experts.copy")

    def leave(self, partial_eNH: Tensor, bias_e1H: Tensor | None) -> Tensor:
        y_eNH = reduce_from(partial_eNH, self.comm, "expert_tensor", "experts.reduce")
        return y_eNH if bias_e1H is None else y_eNH + bias_e1H.to(y_eNH.dtype)


class GatheredSlots(ReplicatedSlots):
    """Each process receives its own slots, which are gathered; the rest is as without DTD, in the paper's order.

    In every region the experts see the same slots in the same order: by sender, then by slot.
    """

    def __init__(self, comm: Collectives) -> None:
        super().__init__(comm)
        self.senders = comm.size("expert")

    def enter(self, x_eNH: Tensor) -> Tensor:
        x = gather_from(x_eNH.unflatten(1, (self.senders, -1)), self.comm, "expert_tensor", "dispatch.gather", dim=2)
        return super().enter(x.flatten(1, 2))

    def leave(self, partial_eNH: Tensor, bias_e1H: Tensor | None) -> Tensor:
        y = super().leave(partial_eNH, bias_e1H).unflatten(1, (self.senders, -1))
        return slice_to(y, self.comm, "expert_tensor", "combine.drop", dim=2).flatten(1, 2)


class ScatteredSlots(GatheredSlots):
    """Each process receives its own slots and gets only their sums: a reduce-scatter is all-reduce and drop."""

    def enter(self, x_eNH: Tensor) -> Tensor:
        x = gather_to(x_eNH.unflatten(1, (self.senders, -1)), self.comm, "expert_tensor", "dispatch.gather", dim=2)
        return x.flatten(1, 2)

    def leave(self, partial_eNH: Tensor, bias_e1H: Tensor | None) -> Tensor:
        partial = partial_eNH.unflatten(1, (self.senders, -1))
        bias = None if bias_e1H is None else bias_e1H.unsqueeze(1).to(partial.dtype)
        return scatter_from(partial, self.comm, "expert_tensor", "experts.reduce", 2, bias).flatten(1, 2)


def token_path(num_experts: int, topology: Topology, kernel: str = "torch") -> tuple[TokenPath, SlotRegion]:
    """Returns the path and the region that the topology's toggles select.

    Args:
        num_experts: Number of experts E.
        topology: The process's place in the meshes.
        kernel: What copies tokens to slots and sums them, ``torch`` or ``triton``.
    """
    layout = topology.layout
    path = DroppingPath if layout.dealt else AllToAllPath
    region = ReplicatedSlots
    if layout.gathers > 1:
        region = ScatteredSlots if layout.scattered else GatheredSlots
    return path(num_experts, topology, kernel), region(topology.comm)
