"""A token path without a capacity that sends a token once to each process, however many of its choices are there.

What travels for a token to one process is a *pilot*: one row, and for each choice of an expert there a number and a
weight. The process gives the row to all of these experts and sends one row back: the weighted sum of their results.
The token adds up its pilots. Experts see the rows that they see without pilots; sums are added in another order.

With ``comm.dedup=node`` this happens twice. A token first sends one pilot to each node, to the process that has the
sender's place there. So each process relays the pilots of one sender of each node, which is as even as can be without
knowing the choices, and recomputation repeats it. It sends a pilot to each process of its node that has experts of the
token's choice, adds up what comes back, and returns one row. Weights are applied where experts are, and their gradients
return as numbers.

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
folded (T_e ≠ T)   as DTD, fused, or sequence; the expert_tensor group gathers and reduces, if T_e > 1
=================  ===========================================================================================

Legend as in ``ragged.py``, and W: the most choices that a pilot can stand for; P: pilots that this process sends; p:
places for the pilots of each process that gathers, as many as one of them received at most; q: places for choices,
likewise. The processes first tell each other how many choices and pilots to expect; the host waits for these numbers
once per layer.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tedlab.comm import (
    Issued,
    Splits,
    evaluating,
    gather_to,
    once,
    scatter_from,
    to_compute_dtype,
)
from tedlab.comm.rows import Rows, by_node, rows_of_pilots
from tedlab.moe.dealt import DealtExperts
from tedlab.moe.experts import ExpertsSpec
from tedlab.moe.gather import gather_rows, grown
from tedlab.moe.pilot_steps import (
    Arrived,
    Numbered,
    Step,
    Told,
    list_choices,
    list_pilots,
    number_choices,
)
from tedlab.moe.products import Order, index_functions
from tedlab.moe.ragged import Exchange, arrange, of_all
from tedlab.moe.router import Routing
from tedlab.moe.slots import histogram
from tedlab.topology import Topology


@dataclass(frozen=True)
class Plan:
    """Who sends which pilots and choices where, in one layer and micro-batch.

    Attributes:
        steps: The exchanges of pilots, in their order.
        width: p, as in the legend.
        choices: The last exchange of choices, as if each were a row.
    """

    steps: tuple[Told, ...]
    width: int
    choices: Exchange


class PilotExperts(DealtExperts):
    """Experts of several processes that exchange pilots as the topology's toggles say."""

    def __init__(self, spec: ExpertsSpec, topology: Topology) -> None:
        super().__init__(spec, topology)
        layout, top_k = topology.layout, spec.config.top_k
        self.nodes, self.processes = layout.nodes, topology.degrees.expert
        most = min(top_k, spec.num_experts // self.processes)
        self.steps = [Step(self.comm, "expert" if self.nodes == 1 else "expert_in_node", most, self.kernel)]
        if self.nodes > 1:
            self.steps.insert(0, Step(self.comm, "expert_between_nodes", top_k, self.kernel))
        self.feeds = "experts.reduce" if self.gathers > 1 else layout.returning

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        (pilots,) = self.send(x_TH, routing)
        return self.answer([pilots], routing).wait()

    def send(self, x_TH: Tensor, routing: Routing) -> list[Issued[tuple[Arrived, Plan]]]:
        x, (gate_TK, expert_TK) = self.enter(to_compute_dtype(x_TH)), self.choices(routing)
        numbered = number_choices(expert_TK, self.num_experts, self.steps[0].processes, self.kernel)
        planned = once("dispatch.counts", lambda: functools.cache(self._start(numbered)))
        # Only exchanges and the copy of tokens need what the host waits for.
        listing = routing.slot_TK, routing.choice_EC
        if self.dealing:
            listing = list_choices(expert_TK, self.num_experts, expert_TK.numel())
        sent = list_pilots(numbered, self.steps[0].most, listing, self.kernel)
        gate_R1 = gather_rows(gate_TK.reshape(-1, 1), sent.choice_R, sent.place_TK.reshape(-1, 1))
        plan = planned()
        there = self.steps[0].send(x, gate_R1, sent, plan.steps[0])
        return [there.then(lambda arrived: (arrived, plan))]

    def answer(self, sent: list[Issued[tuple[Arrived, Plan]]], routing: Routing) -> Issued[Tensor]:
        first, plan = sent[0].wait()
        last = first if self.nodes == 1 else self._pass_on(first, plan)
        back = self.steps[-1].back(self._computed(last, plan), last)
        if self.nodes > 1:
            back = self.steps[0].back(back.wait(), first)
        return back.then(lambda y_TH: self.leave(y_TH, len(routing.gate_TK)))

    def _pass_on(self, arrived: Arrived, plan: Plan) -> Arrived:
        """Sends pilots that came from other nodes, or this one, to the processes of this node."""
        step, local = self.steps[1], self.num_experts // self.nodes
        expert_pW, at_pW = arrived.choices(self.steps[0].most)
        numbered = number_choices(expert_pW, local, step.processes, self.kernel)
        listing = list_choices(expert_pW, local, len(arrived.code_q))
        sent = list_pilots(numbered, step.most, listing, self.kernel)
        from_R, to_q = at_pW.flatten()[sent.choice_R], sent.place_TK.flatten()[arrived.code_q]
        gate_R1 = gather_rows(arrived.gate_q1, from_R, to_q.unsqueeze(1))
        return step.send(arrived.x_pH, gate_R1, sent, plan.steps[1]).wait()

    def _computed(self, arrived: Arrived, plan: Plan) -> Tensor:
        """Returns the weighted sum of experts' results for each pilot that arrived in this process."""
        x_pH, gate_q1, most = arrived.x_pH, arrived.gate_q1, self.steps[-1].most
        code_iq = once("dispatch.gather_choices", lambda: self._of_all(arrived.code_q, plan))
        if self.gathers > 1:
            x_pH = gather_to(grown(x_pH, plan.width), self.comm, "expert_tensor", "dispatch.gather", dim=0)
            gate_q1 = grown(gate_q1, plan.choices.width)
            gate_q1 = gather_to(gate_q1, self.comm, "expert_tensor", "dispatch.gather_gates", dim=0)
        order, at_pW = order_of(plan.choices, code_iq, len(x_pH), most)
        gate_pW = gather_rows(gate_q1, at_pW.flatten(), code_iq.unsqueeze(1)).view_as(at_pW)
        y_pH = self.sums(x_pH, gate_pW, order, self.feeds)
        if self.gathers > 1:
            y_pH = scatter_from(y_pH, self.comm, "expert_tensor", "experts.reduce", dim=0)[: len(arrived.x_pH)]
        return y_pH

    # ---- the plan of the exchanges ---------------------------------------------------------------------------------

    def _start(self, numbered: Numbered) -> Callable[[], Plan]:
        """Exchanges numbers of choices and pilots, and returns a function that waits for them."""
        counts_E = histogram(numbered.expert_TK.flatten(), self.num_experts)
        if self.nodes > 1:
            return self._start_by_node(numbered, counts_E.view(self.processes, -1))
        sent_sx = torch.cat((counts_E.view(self.processes, -1), numbered.pilots_s.unsqueeze(1)), 1)
        arriving_sx = self.comm.all_to_all(sent_sx, "expert", tag="dispatch.counts", phase="forward")
        counts_isx = of_all(self.comm, arriving_sx, self.gathers)
        read = self.comm.reader(torch.cat((sent_sx.unsqueeze(0), counts_isx)))

        def finish() -> tuple[Plan, Rows]:
            values = np.array(read())
            return self._last(values[0], values[1:], counts_isx)

        return self._counted(finish)

    def _start_by_node(self, numbered: Numbered, counts_se: Tensor) -> Callable[[], Plan]:
        """Also tells the processes that pass pilots on how many, so that the host waits only once.

        A process tells each node, first: for each process of the node the choices of its experts, and in how many
        tokens there are any; last, its pilots to the node.
        """
        comm, nodes, (processes, experts) = self.comm, self.nodes, counts_se.shape
        local = processes // nodes
        of_processes = number_choices(numbered.expert_TK, self.num_experts, processes, self.kernel).pilots_s
        sent_nx = torch.cat((counts_se, of_processes.unsqueeze(1)), 1).view(nodes, -1)
        sent_nx = torch.cat((sent_nx, numbered.pilots_s.unsqueeze(1)), 1)
        tag = "dispatch.counts_between_nodes"
        relayed_nx = comm.all_to_all(sent_nx, "expert_between_nodes", tag=tag, phase="forward")
        passed_nlx = relayed_nx[:, :-1].view(nodes, local, experts + 1)
        tag = "dispatch.counts_in_node"
        arriving_lx = comm.all_to_all(passed_nlx.sum(0), "expert_in_node", tag=tag, phase="forward")
        counts_ilx = of_all(comm, arriving_lx, self.gathers)
        read = comm.reader(torch.cat((sent_nx.flatten(), relayed_nx.flatten(), counts_ilx.flatten())).unsqueeze(0))

        def finish() -> tuple[Plan, Rows]:
            values = np.array(read()).flatten()
            sent, relayed = values[: 2 * sent_nx.numel()].reshape(2, *sent_nx.shape)
            arriving = values[2 * sent_nx.numel() :].reshape(counts_ilx.shape)
            through = relayed[:, :-1].reshape(passed_nlx.shape)
            choices = [part[:, :-1].reshape(passed_nlx.shape)[..., :-1].sum((1, 2)) for part in (sent, relayed)]
            first = Told(
                _splits(sent[:, -1], relayed[:, -1]),
                _splits(*choices),
                relayed_nx[:, -1],
                passed_nlx[..., :-1].flatten(1),
            )
            plan, rows = self._last(through.sum(0), arriving, counts_ilx)
            return replace(plan, steps=(first, *plan.steps)), by_node(rows, sent, relayed, local)

        return self._counted(finish)

    def _last(self, sent_sx: np.ndarray, arriving_isx: np.ndarray, counts_isx: Tensor) -> tuple[Plan, Rows]:
        """Returns the plan of the exchange that brings pilots to experts, as the only one."""
        own = self._own
        rows = rows_of_pilots(sent_sx, arriving_isx, own)
        arriving_sx = arriving_isx[own]
        pilots = _splits(sent_sx[:, -1], arriving_sx[:, -1])
        choices = _splits(sent_sx[:, :-1].sum(1), arriving_sx[:, :-1].sum(1))
        sizes = tuple(arriving_isx[..., :-1].sum((0, 1)).tolist())
        width, of_choices = rows.gathered // self.gathers, rows.choices_gathered // self.gathers
        exchange = Exchange(choices, counts_isx[..., :-1], of_choices, rows.computed, sizes, self.kernel)
        told = Told(pilots, choices, counts_isx[own, :, -1], counts_isx[own, :, :-1])
        return Plan((told,), width, exchange), rows

    def _counted(self, finish: Callable[[], tuple[Plan, Rows]]) -> Callable[[], Plan]:
        """Adds what is moved to the total, if a backward pass may follow."""
        counted = not evaluating()

        def plan() -> Plan:
            found, moved = finish()
            if counted:
                self.moved += moved
            return found

        return plan

    def _of_all(self, code_q: Tensor, plan: Plan) -> Tensor:
        """Returns the numbers of choices that all who gather received, with pilots in the places of all.

        Returns:
            (processes that gather · q,) int64: for each choice, W · the place of its pilot plus its number; -1 if there
            is none.
        """
        if self.gathers == 1:
            return code_q
        code_q = code_q + self.steps[-1].most * self._own * plan.width
        code_q = F.pad(code_q, (0, plan.choices.width - len(code_q)), value=-1)
        return self.comm.all_gather(code_q, "expert_tensor", tag="dispatch.gather_choices", phase="forward")

    @property
    def _own(self) -> int:
        """This process's number among those that gather, each of which receives pilots of its own."""
        return self.comm.rank("expert_tensor") if self.gathers > 1 else 0


def _splits(sent: np.ndarray, received: np.ndarray) -> Splits:
    return Splits(tuple(sent.tolist()), tuple(received.tolist()))


def order_of(choices: Exchange, code_iq: Tensor, places: int, most: int) -> tuple[Order, Tensor]:
    """Returns the order in which experts compute the choices of received pilots, without waiting for the device.

    Args:
        choices: How the choices came, as if each were a row.
        code_iq: For each of them, W · the place of its pilot plus its number; -1: there is none.
        places: Number of places for pilots, of all who gather.
        most: W, as in the legend.

    Returns:
        The order, to which pilots are tokens, and where each choice of a pilot lies among those received (p, W), -1 if
        there is none.
    """
    arrangement = arrange(choices)
    groups, index = arrangement.groups, index_functions(choices.kernel, code_iq.device)
    codes = index.codes(code_iq, arrangement.row_N, groups.expert_N, places, most)
    return Order(codes.token_N, codes.choice_N, codes.row_pW, codes.expert_pW, groups), codes.at_pW
