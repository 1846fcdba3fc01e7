"""A token path without a capacity that sends a token once to each process, however many of its choices are there.

What travels for a token to one process is a *pilot*: one row, and for each choice of an expert there a number and a
weight. The process gives the row to all of these experts and sends one row back: the weighted sum of their results.
The token adds up its pilots. Experts see the rows that they see without pilots; sums are added in another order.

Rows are copied to experts and summed by the kernels that serve a process with all experts (``local.py``), to which
received pilots are tokens. So little is kept for the backward pass here, too: the pilots that arrived.

=================  ===========================================================================================
mode               pilots
=================  ===========================================================================================
plain TED          every tensor rank sends the pilots of all tokens, gets back partial sums, and adds up those
                   of each token, which are all-reduced
DTD, fused         tensor rank r mod T sends those of token r; what each received is gathered, and a
                   reduce-scatter returns the sums of its own; tokens are gathered at the end
sequence parallel  as with DTD, but each tensor rank has its own tokens from the beginning
=================  ===========================================================================================

Legend as in ``ragged.py``, and W: the most choices that a pilot can stand for; P: pilots that this process sends; p:
places for the pilots of each tensor rank, as many as one of them received at most; q: places for choices, likewise. The
processes first tell each other how many choices and pilots to expect; the host waits for these numbers once per layer.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tedlab.comm import (
    Issued,
    Splits,
    copy_to,
    gather_from,
    gather_to,
    issue_all_to_all,
    once,
    reduce_from,
    scatter_from,
    slice_to,
    to_compute_dtype,
)
from tedlab.comm.differentiable import all_to_all
from tedlab.comm.rows import rows_of_pilots
from tedlab.moe.experts import ExpertsSpec
from tedlab.moe.gather import chosen_experts, gather_rows, grown, sum_rows
from tedlab.moe.local import TokenExperts
from tedlab.moe.products import Order
from tedlab.moe.ragged import Exchange, arrange, numbers
from tedlab.moe.router import Routing
from tedlab.moe.slots import histogram, sort_choices
from tedlab.topology import Topology


@dataclass(frozen=True)
class Sent:
    """The pilots and choices that this process sends, each in the order in which they leave.

    Attributes:
        token_R: (T·K,) int64: its first P numbers are the tokens of the pilots.
        pilot_TK: (T, K) int64: the pilots of each token, one for each process; -1: none.
        choice_R: (R,) int64: the choice t·K + k in each place.
        place_TK: (T, K) int64, the inverse.
        code_R: (R,) int64: for each choice, W · the number of its pilot among those that go to the same process, plus
            its own number among the choices of that pilot.
    """

    token_R: Tensor
    pilot_TK: Tensor
    choice_R: Tensor
    place_TK: Tensor
    code_R: Tensor


@dataclass(frozen=True)
class Pilots:
    """Who sends which pilots and choices where, in one layer and micro-batch.

    Attributes:
        splits: Splits of the all-to-all of pilots to the experts.
        width: p, as in the legend.
        choices: The exchange of their choices, as if each were a row.
        counts_sx: (E_p, e + 1) int64 on the device: choices of each expert, and pilots, that each process sends here.
    """

    splits: Splits
    width: int
    choices: Exchange
    counts_sx: Tensor


class PilotExperts(TokenExperts):
    """Experts of several processes that exchange pilots as the topology's toggles say.

    Raises:
        ValueError: With DTD in the paper's order, which reduces rows; and with several chunks.
    """

    def __init__(self, spec: ExpertsSpec, topology: Topology) -> None:
        super().__init__(spec, topology)
        if topology.layout.chunks > 1:
            raise ValueError("comm.dedup=rank sends all choices of a token at once: it needs comm.chunks=1")
        if topology.layout.sharers > 1 and not topology.layout.scattered:
            raise ValueError("comm.dedup=rank with comm.dtd=true needs comm.fuse_reduce_scatter=true")
        self.dealing = topology.options.dtd and topology.degrees.tensor > 1
        self.sharers = topology.layout.sharers
        self.processes = topology.degrees.expert
        self.most = min(spec.config.top_k, spec.num_experts // self.processes)
        self.feeds = "experts.reduce" if self.sharers > 1 else "combine.all_to_all"

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        (pilots,) = self.send(x_TH, routing)
        return self.answer([pilots], routing).wait()

    def send(self, x_TH: Tensor, routing: Routing) -> list[Issued["_Arrived"]]:
        x, gate_TK, expert_TK = self._enter(to_compute_dtype(x_TH), routing)
        numbered = number_choices(expert_TK, self.num_experts, self.processes)
        exchanged = once("dispatch.counts", lambda: functools.cache(self._start(numbered.counts_sx)))
        # Only exchanges and the copy of tokens need what the host waits for.
        listing = None if self.dealing else (routing.slot_TK, routing.choice_EC)
        sent = list_pilots(numbered, self.most, listing)
        gate_R1 = gather_rows(gate_TK.reshape(-1, 1), sent.choice_R, sent.place_TK.reshape(-1, 1))
        pilots = exchanged()
        code_iq = once("dispatch.choices", lambda: self._tell(sent.code_R, pilots))
        token_P = sent.token_R[: sum(pilots.splits.sent)]
        x_PH = gather_rows(x, token_P, sent.pilot_TK, self.kernel)
        gates = all_to_all(gate_R1, self.comm, "expert", "dispatch.gates", pilots.choices.splits)
        there = issue_all_to_all(x_PH, self.comm, "expert", "dispatch.all_to_all", pilots.splits)
        tokens = len(x_TH)
        return [there.then(lambda x_pH: _Arrived(x_pH, gates, code_iq, pilots, token_P, sent.pilot_TK, tokens))]

    def answer(self, sent: list[Issued["_Arrived"]], routing: Routing) -> Issued[Tensor]:
        arrived = sent[0].wait()
        splits, width = arrived.pilots.splits, arrived.pilots.width
        x_pH, gate_q1, code_iq = arrived.x_pH, arrived.gate_q1, arrived.code_iq
        if self.sharers > 1:
            x_pH = gather_to(grown(x_pH, width), self.comm, "expert_tensor", "dispatch.gather", dim=0)
            gate_q1 = grown(gate_q1, arrived.pilots.choices.width)
            gate_q1 = gather_to(gate_q1, self.comm, "expert_tensor", "dispatch.gather_gates", dim=0)
        order, at_pW = order_of(arrived.pilots.choices, code_iq, len(x_pH), self.most)
        gate_pW = gather_rows(gate_q1, at_pW.flatten(), code_iq.unsqueeze(1)).view_as(at_pW)
        y_pH = self.sums(x_pH, gate_pW, order, self.feeds)
        if self.sharers > 1:
            y_pH = scatter_from(y_pH, self.comm, "expert_tensor", "experts.reduce", dim=0)[: sum(splits.received)]
        back = issue_all_to_all(y_pH, self.comm, "expert", "combine.all_to_all", splits.reverse)
        return back.then(
            lambda y_PH: self._leave(sum_rows(y_PH, arrived.token_P, arrived.pilot_TK, self.kernel), arrived)
        )

    # ---- the tokens that this process sends ------------------------------------------------------------------------

    def _enter(self, x_TH: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the tokens that this process sends, the weights of their choices, and their experts."""
        gate_TK, expert_TK = routing.gate_TK, chosen_experts(routing)
        if self.dealing:
            own = slice(self.comm.rank("tensor"), None, self.sharers)
            gate_TK = self._hand(gate_TK, "dispatch.drop_gates")
            return self._hand(x_TH, "dispatch.drop"), gate_TK, expert_TK[own]
        if self.sharers == 1:
            x_TH = copy_to(x_TH, self.comm, "expert_tensor", "experts.copy")
            gate_TK = copy_to(gate_TK, self.comm, "expert_tensor", "experts.copy_gates")
        return x_TH, gate_TK, expert_TK

    def _hand(self, x: Tensor, tag: str) -> Tensor:
        """Returns every T-th token, from the one with this tensor rank's number."""
        own = len(range(self.comm.rank("tensor"), len(x), self.sharers))
        x = grown(x, -(-len(x) // self.sharers) * self.sharers)
        return slice_to(x.unflatten(0, (-1, self.sharers)), self.comm, "tensor", tag, dim=1).flatten(0, 1)[:own]

    def _leave(self, y_TH: Tensor, arrived: "_Arrived") -> Tensor:
        """Inverts :meth:`_enter`."""
        if self.dealing:
            hand = grown(y_TH, -(-arrived.tokens // self.sharers)).unsqueeze(1)
            return gather_from(hand, self.comm, "tensor", "combine.gather", dim=1).flatten(0, 1)[: arrived.tokens]
        return reduce_from(y_TH, self.comm, "expert_tensor", "experts.reduce") if self.sharers == 1 else y_TH

    # ---- the plan of the exchange ----------------------------------------------------------------------------------

    def _start(self, sent_sx: Tensor) -> Callable[[], Pilots]:
        """Exchanges numbers of choices and pilots, and returns a function that waits for them."""
        counts_isx = numbers(self.comm, sent_sx, self.sharers)
        read = self.comm.reader(torch.cat((sent_sx.unsqueeze(0), counts_isx)))
        own = self.comm.rank("expert_tensor") if self.sharers > 1 else 0
        counted = torch.is_grad_enabled()

        def finish() -> Pilots:
            values = np.array(read())
            sent, arriving = values[0], values[1:]
            moved = rows_of_pilots(sent, arriving, own)
            if counted:
                self.moved += moved
            pilots = Splits(*(tuple(counts[:, -1].tolist()) for counts in (sent, arriving[own])))
            choices = Splits(*(tuple(counts[:, :-1].sum(1).tolist()) for counts in (sent, arriving[own])))
            sizes = tuple(arriving[..., :-1].sum((0, 1)).tolist())
            width, of_choices = moved.gathered // self.sharers, moved.choices_gathered // self.sharers
            exchange = Exchange(choices, counts_isx[..., :-1], of_choices, moved.computed, sizes, self.kernel)
            return Pilots(pilots, width, exchange, counts_isx[own])

        return finish

    def _tell(self, code_R: Tensor, pilots: Pilots) -> Tensor:
        """Exchanges the numbers of choices.

        Returns:
            (tensor ranks · q,) int64: for each choice received, W · the place of its pilot plus its number; -1: there
            is none.
        """
        comm, choices, counts_sx = self.comm, pilots.choices, pilots.counts_sx
        code_q = comm.all_to_all(code_R, "expert", tag="dispatch.choices", phase="forward", splits=choices.splits)
        # A sender counts the pilots that it sends here from 0; they lie behind those of the senders before it.
        before_s = counts_sx[:, -1].cumsum(0) - counts_sx[:, -1]
        if self.sharers > 1:
            before_s = before_s + comm.rank("expert_tensor") * pilots.width
        code_q = code_q + self.most * before_s.repeat_interleave(counts_sx[:, :-1].sum(1), output_size=len(code_q))
        if self.sharers == 1:
            return code_q
        code_q = F.pad(code_q, (0, choices.width - len(code_q)), value=-1)
        return comm.all_gather(code_q, "expert_tensor", tag="dispatch.gather_choices", phase="forward")


@dataclass(frozen=True)
class _Arrived:
    """What arrived at this process, and what it needs to know of what it sent.

    Attributes:
        x_pH: Pilots.
        gate_q1: The weights of their choices.
        code_iq: The numbers of their choices, see :meth:`PilotExperts._tell`.
        pilots: How they came.
        token_P, pilot_TK: See :class:`Sent`.
        tokens: The number of this process's tokens, before they are dealt.
    """

    x_pH: Tensor
    gate_q1: Tensor
    code_iq: Tensor
    pilots: Pilots
    token_P: Tensor
    pilot_TK: Tensor
    tokens: int


class Numbered(NamedTuple):
    """Choices, numbered among those that their token has in the same process.

    Attributes:
        expert_TK, process_TK: The expert and the process of each.
        same_TKK: Whether two choices of a token are in the same process.
        number_TK: The number of each; that with number 0 stands for the pilot.
        counts_sx: (E_p, e + 1) int64: choices of each expert of each process, and pilots.
    """

    expert_TK: Tensor
    process_TK: Tensor
    same_TKK: Tensor
    number_TK: Tensor
    counts_sx: Tensor


def number_choices(expert_TK: Tensor, num_experts: int, processes: int) -> Numbered:
    """Numbers the choices of each token by process, and counts them and their pilots, which takes no sorting.

    Args:
        expert_TK: (T, K) int64, the chosen experts.
        num_experts: Number of experts, E.
        processes: Number of processes that divide them evenly, E_p.
    """
    process_TK = expert_TK.div(num_experts // processes, rounding_mode="floor")
    same_TKK = process_TK.unsqueeze(2) == process_TK.unsqueeze(1)
    number_TK = same_TKK.tril(-1).sum(2)
    counts_E = histogram(expert_TK.flatten(), num_experts)
    pilots_s = histogram(process_TK.flatten(), processes, (number_TK == 0).flatten())
    counts_sx = torch.cat((counts_E.view(processes, -1), pilots_s.unsqueeze(1)), 1)
    return Numbered(expert_TK, process_TK, same_TKK, number_TK, counts_sx)


def list_pilots(numbered: Numbered, most: int, listing: tuple[Tensor, Tensor] | None = None) -> Sent:
    """Lists the pilots of tokens by process and then by token, and their choices by expert and then by token.

    Args:
        numbered: The choices.
        most: W, as in the legend.
        listing: The place of each choice (T, K), and the choice in each place (T·K,), if they are known.
    """
    expert_TK, process_TK, same_TKK, number_TK, counts_sx = numbered
    processes, first_TK, pilots_s = len(counts_sx), number_TK == 0, counts_sx[:, -1]
    first_place_TK, choices, _ = sort_choices(process_TK.masked_fill(~first_TK, processes), processes + 1)
    pilot_TK = first_place_TK.masked_fill(~first_TK, -1)
    pilot_of_TK = torch.where(same_TKK, pilot_TK.unsqueeze(1), -1).amax(2)
    start_s = pilots_s.cumsum(0) - pilots_s
    place_TK, choice_R = listing or sort_choices(expert_TK, counts_sx[:, :-1].numel())[:2]
    # A router without a finite score repeats an expert; losses end such a run, which must get that far.
    code_TK = (pilot_of_TK - start_s[process_TK]) * most + number_TK.clamp(max=most - 1)
    return Sent(
        token_R=choices.div(expert_TK.shape[1], rounding_mode="floor"),
        pilot_TK=pilot_TK,
        choice_R=choice_R,
        place_TK=place_TK,
        code_R=code_TK.flatten()[choice_R],
    )


def order_of(choices: Exchange, code_iq: Tensor, places: int, most: int) -> tuple[Order, Tensor]:
    """Returns the order in which experts compute the choices of received pilots, without waiting for the device.

    Args:
        choices: How the choices came, as if each were a row.
        code_iq: For each of them, W · the place of its pilot plus its number; -1: there is none.
        places: Number of places for pilots, of all tensor ranks.
        most: W, as in the legend.

    Returns:
        The order, to which pilots are tokens, and where each choice of a pilot lies among those received (p, W), -1 if
        there is none.
    """
    arrangement = arrange(choices)
    groups = arrangement.groups
    choice_N = code_iq if arrangement.row_N is None else code_iq[arrangement.row_N]
    row_pW = _inverse(choice_N, places * most).view(-1, most)
    expert_pW = torch.zeros_like(row_pW).flatten().scatter_(0, choice_N, groups.expert_N).view_as(row_pW)
    order = Order(choice_N.div(most, rounding_mode="floor"), choice_N, row_pW, expert_pW, groups)
    return order, _inverse(code_iq, places * most).view(-1, most)


def _inverse(index: Tensor, size: int) -> Tensor:
    """Returns where each number from 0 to ``size`` - 1 stands in ``index``, -1 if nowhere; -1 in it means nothing."""
    at = torch.full((size + 1,), -1, dtype=torch.int64, device=index.device)  # the last one is cut off
    return at.scatter_(0, index.masked_fill(index < 0, size), torch.arange(len(index), device=index.device))[:size]
