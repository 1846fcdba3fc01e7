"""Token paths: how tokens reach their experts and how results come back. Those without a capacity: ``ragged.py``.

A token path has two methods, ``dispatch`` and ``combine``, between a token's place in the micro-batch and its slot at
an expert; a slot region has two, ``enter`` and ``leave``, between the slots of one tensor rank and those that an expert
sees. Neither knows of routers' and experts' weights. Together they make the ways of the paper (§5.1) and of sequence
parallelism:

=================  ====================  ====================================================================
mode               path and region       what is sent (forward)
=================  ====================  ====================================================================
plain TED          all-to-all,           every tensor rank exchanges every slot, all-reduce of the results
                   replicated slots
DTD                dropping,             each exchanges 1/T of the slots; all-gather; all-reduce, of which 1/T
                   gathered slots        goes back; all-gather
DTD, fused         dropping,             the same with a reduce-scatter for all-reduce and drop
                   scattered slots
sequence parallel  all-to-all,           each tensor rank has its own tokens, so nothing is to be dropped
                   scattered slots
=================  ====================  ====================================================================

Legend as in ``router.py``; in addition e: experts of this process (E / E_p), N = E_p·C: slots of one expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from tedlab.capacity import group_capacity
from tedlab.comm import (
    Collectives,
    all_to_all,
    copy_to,
    gather_from,
    gather_to,
    reduce_from,
    scatter_from,
    slice_to,
    to_compute_dtype,
)
from tedlab.comm.rows import Rows, hands, rows_of, spread
from tedlab.config import MoEConfig
from tedlab.moe.router import Routing
from tedlab.spec import Layout, MicroBatch, Site, Sites, Spec, Work
from tedlab.topology import Topology


@dataclass(frozen=True)
class DispatchSpec(Spec):
    """Of a token path and its region, with slots or with rows."""

    hidden: int
    config: MoEConfig

    def sites(self, layout: Layout) -> Sites:
        sliced, scattered, hidden = layout.sharers > 1, layout.scattered, self.hidden
        dealt = sliced and not layout.sequence
        to = Site("dispatch.all_to_all", "all_to_all", "expert", hidden, "sent", result="received")
        back = Site("combine.all_to_all", "all_to_all", "expert", hidden, "received", result="sent")
        spread = Site("dispatch.gather", "all_gather", "expert_tensor", hidden, "gathered", replicated=True)
        summed = Site("experts.reduce", "all_reduce", "expert_tensor", hidden, "computed", replicated=True)
        whole = Site("combine.gather", "all_gather", "tensor", hidden * layout.sharers, "sent", replicated=True)
        if scattered:
            summed = replace(summed, op="reduce_scatter", rows="gathered", replicated=False)
        forward = [
            *self._counts(layout),
            replace(to, feeds=spread.tag if sliced else None, replicated=not sliced),
            *([spread] if sliced else []),
            replace(summed, feeds=back.tag),
            replace(back, feeds=whole.tag if dealt else None, replicated=not sliced),
            *([whole] if dealt else []),
        ]
        if scattered:
            inside = [replace(summed, op="all_gather"), replace(spread, op="reduce_scatter")]
        else:
            inside = [replace(spread, tag="combine.drop")] if sliced else []
            inside.append(replace(summed, tag="experts.copy"))
        dropped = [replace(whole, tag="dispatch.drop")] if dealt else []
        # The way back of the gradient is that of the rows, in turn.
        return Sites(tuple(forward), (replace(back, rows="sent"), *inside, replace(to, rows="received"), *dropped))

    def _counts(self, layout: Layout) -> list[Site]:
        """Without a capacity, processes say how many rows they will send; once, whatever is recomputed."""
        if not self.config.unlimited:
            return []
        experts = self.config.num_experts
        own = Site("dispatch.counts", "all_to_all", "expert", experts, "once", "index", recomputed=False)
        width = layout.degrees.tensor * experts
        all_ranks = replace(own, tag="dispatch.gather_counts", op="all_gather", kind="expert_tensor", width=width)
        return [own, all_ranks] if layout.sharers > 1 else [own]

    def rows(self, layout: Layout, tokens: int) -> Rows:
        """What the first process moves of a data rank's micro-batch; of rows if all experts are chosen equally often.

        Slots count as rows, all of them.
        """
        moe, sharers, senders = self.config, layout.sharers, layout.degrees.expert
        if moe.unlimited:
            counts = spread([1.0] * moe.num_experts, tokens * moe.top_k, tokens)
            sent = hands(np.tile(counts, (senders, 1)), sharers)
            return rows_of(sent[:, :, : moe.num_experts // senders], int(sent[0, 0].sum()), 0)
        groups = moe.capacity_groups or (sharers if layout.sequence else 1)
        capacity = groups * group_capacity(moe, tokens // groups, groups)
        slots = -(-capacity // sharers) * moe.num_experts  # grown until each tensor rank has as many
        return Rows(slots, slots, sharers * slots, sharers * slots)

    def there(self, b: MicroBatch) -> Iterator[Work]:
        """Kernels of tokens on their way to experts, and of the gradients of their results."""
        sliced, width = b.layout.sharers > 1, self.hidden
        yield from self._indexed(b, b.rows.sent if b.layout.sequence else b.rows.computed)
        if sliced and not b.layout.sequence:
            yield b.moved(2 * b.rows.sent * width)
        if self._reordered(b):
            yield b.moved(2 * b.rows.sent * width)
        if sliced:
            yield b.moved(2 * b.rows.computed * width)

    def back(self, b: MicroBatch, bias: bool) -> Iterator[Work]:
        """The way back, on which results get their bias, but gradients none."""
        sliced, scattered, width = b.layout.sharers > 1, b.layout.scattered, self.hidden
        if scattered:
            yield b.moved(2 * b.rows.computed * width)  # into the order of receivers
        if bias:
            yield b.moved(2 * (b.rows.sent if scattered else b.rows.computed) * width)
        if sliced and not scattered:
            yield b.moved(2 * b.rows.sent * width)
        if self._reordered(b):
            yield b.moved(2 * b.rows.sent * width)
        if sliced and not b.layout.sequence:
            yield b.moved(2 * b.rows.computed * width)
        yield from self._indexed(b, b.outside * self.config.top_k)

    def saved(self, b: MicroBatch) -> int:
        """Indices of choices and of slots."""
        return (4 * b.outside * self.config.top_k + 2 * b.rows.computed) * torch.int64.itemsize

    def _indexed(self, b: MicroBatch, rows: int) -> Iterator[Work]:
        """Rows by index, and zeros in place of those that are missing."""
        for _ in range(2):
            yield b.moved(2 * rows * self.hidden)

    def _reordered(self, b: MicroBatch) -> bool:
        """Whether what comes by sender has to be sorted by expert."""
        return self.config.num_experts > b.layout.degrees.expert > 1


class TokenPath(Protocol):
    """From tokens to slots, and back."""

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Tokens of this rank (T, H) → slots of this rank's experts (e, N, H); empty slots hold zeros."""
        ...

    def combine(self, y_eNH: Tensor, routing: Routing) -> Tensor:
        """Experts' results (e, N, H) → for each token of this rank the gate-weighted sum of its choices (T, H)."""
        ...


class AllToAllPath:
    """Every process exchanges the slots of all its tokens within its expert group.

    Tokens are moved by index, never by multiplication with a one-hot mask.

    Args:
        num_experts: E, a multiple of the expert degree.
        topology: where this process stands.
    """

    def __init__(self, num_experts: int, topology: Topology) -> None:
        self.comm, self.agreement = topology.comm, topology.slots
        self.num_experts = num_experts
        self.ranks = self.comm.size("expert")

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Tensor:
        return self._to_experts(self._slots(x_TH, routing))

    def combine(self, y_eNH: Tensor, routing: Routing) -> Tensor:
        return self._tokens(self._from_experts(y_eNH), routing)

    def _slots(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Tokens to their slots: (E, C, H), with C as all processes agree on."""
        x_ECH = spread_choices(x_TH, routing).unflatten(0, (self.num_experts, -1))
        return _grown(x_ECH, self.agreement.largest(x_ECH.shape[1]))

    def _to_experts(self, x_ECH: Tensor) -> Tensor:
        x = all_to_all(x_ECH, self.comm, "expert", "dispatch.all_to_all")
        return x.unflatten(0, (self.ranks, -1)).transpose(0, 1).flatten(1, 2)  # (E_p senders, e, C, H) → (e, N, H)

    def _from_experts(self, y_eNH: Tensor) -> Tensor:
        y = y_eNH.unflatten(1, (self.ranks, -1)).transpose(0, 1).flatten(0, 1)  # (E_p receivers · e, C, H)
        return all_to_all(y, self.comm, "expert", "combine.all_to_all")  # (E, C, H)

    def _tokens(self, y_ECH: Tensor, routing: Routing) -> Tensor:
        own = len(routing.choice_EC) // self.num_experts
        return merge_choices(y_ECH[:, :own].flatten(0, 1), routing)


class DroppingPath(AllToAllPath):
    """Duplicate token dropping (paper §5.1): of the slots that all tensor ranks hold alike, each exchanges 1/T.

    Rank i takes the i-th of T slices of every expert's slots. Where T does not divide the capacity, the buffer grows by
    empty slots, and no other token is dropped than without DTD.
    """

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Tensor:
        x_ECH, tensor = self._slots(x_TH, routing), self.comm.size("tensor")
        x_ECH = _grown(x_ECH, -(-x_ECH.shape[1] // tensor) * tensor)
        return self._to_experts(slice_to(x_ECH, self.comm, "tensor", "dispatch.drop", dim=1))

    def combine(self, y_eNH: Tensor, routing: Routing) -> Tensor:
        y_ECH = gather_from(self._from_experts(y_eNH), self.comm, "tensor", "combine.gather", dim=1)
        return self._tokens(y_ECH, routing)


def _grown(x_ECH: Tensor, capacity: int) -> Tensor:
    """With empty slots, up to a capacity."""
    missing = capacity - x_ECH.shape[1]
    return F.pad(x_ECH, (0, 0, 0, missing)) if missing else x_ECH


class SlotRegion(Protocol):
    """Where the tensor-parallel computation of experts begins and ends."""

    def enter(self, x_eNH: Tensor) -> Tensor:
        """Slots that this tensor rank was sent → slots that every tensor rank computes its part of."""
        ...

    def leave(self, partial_eNH: Tensor, bias_e1H: Tensor | None) -> Tensor:
        """Each tensor rank's part of the results → results, plus bias if any, of the slots that it sends back."""
        ...


class ReplicatedSlots:
    """Every tensor rank was sent the same slots."""

    def __init__(self, comm: Collectives) -> None:
        self.comm = comm

    def enter(self, x_eNH: Tensor) -> Tensor:
        return copy_to(x_eNH, self.comm, "expert_tensor", "experts.copy")

    def leave(self, partial_eNH: Tensor, bias_e1H: Tensor | None) -> Tensor:
        y_eNH = reduce_from(partial_eNH, self.comm, "expert_tensor", "experts.reduce")
        return y_eNH if bias_e1H is None else y_eNH + bias_e1H.to(y_eNH.dtype)


class GatheredSlots(ReplicatedSlots):
    """Each tensor rank was sent its own slots; apart from that as without DTD. In the paper's order.

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
    """Each tensor rank was sent its own slots, and gets only their sums: all-reduce and drop are one."""

    def enter(self, x_eNH: Tensor) -> Tensor:
        x = gather_to(x_eNH.unflatten(1, (self.senders, -1)), self.comm, "expert_tensor", "dispatch.gather", dim=2)
        return x.flatten(1, 2)

    def leave(self, partial_eNH: Tensor, bias_e1H: Tensor | None) -> Tensor:
        partial = partial_eNH.unflatten(1, (self.senders, -1))
        bias = None if bias_e1H is None else bias_e1H.unsqueeze(1).to(partial.dtype)
        return scatter_from(partial, self.comm, "expert_tensor", "experts.reduce", 2, bias).flatten(1, 2)


def token_path(num_experts: int, topology: Topology) -> tuple[TokenPath, SlotRegion]:
    """The path and the region that the topology's toggles ask for."""
    comm, options = topology.comm, topology.options
    if topology.sequence_sharded:
        return AllToAllPath(num_experts, topology), ScatteredSlots(comm)
    if not options.dtd:
        return AllToAllPath(num_experts, topology), ReplicatedSlots(comm)
    return DroppingPath(num_experts, topology), (ScatteredSlots if options.fuse_reduce_scatter else GatheredSlots)(comm)


def spread_choices(x_TH: Tensor, routing: Routing) -> Tensor:
    """Tokens to the slots of their choices, which are sorted by expert and hence by rank; zeros in empty slots."""
    token = routing.choice_EC.div(routing.slot_TK.shape[1], rounding_mode="floor")  # -1 stays -1
    return gather_rows(to_compute_dtype(x_TH), token, routing.slot_TK)


def merge_choices(y: Tensor, routing: Routing) -> Tensor:
    """Results in their slots → for each token the gate-weighted sum of its choices (T, H)."""
    y_TKH = gather_rows(y, routing.slot_TK.flatten(), routing.choice_EC.unsqueeze(1)).unflatten(
        0, routing.slot_TK.shape
    )
    return (y_TKH * routing.gate_TK.to(y.dtype).unsqueeze(-1)).sum(1)


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Rows by index, in both directions a gather: no atomics, so the same result every time.

    Forward: ``out[m] = x[index[m]]``, or zeros where ``index[m]`` is -1. ``inverse[n]`` lists every m with
    ``index[m] = n``, padded with -1, so backward is ``grad_x[n] = Σ_r grad_out[inverse[n, r]]``.
    """
    return _GatherRows.apply(x, index, inverse)


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _rows(x, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors  # (n, r)
        columns = [_rows(grads[0], column) for column in inverse.unbind(1)]
        return sum(columns[1:], start=columns[0]), None, None


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index.clamp(min=0)).masked_fill_((index < 0).unsqueeze(1), 0.0)
