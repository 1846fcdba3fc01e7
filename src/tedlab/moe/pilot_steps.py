"""One exchange of pilots: who sends which tokens where, with which of their choices. See ``pilots.py``, and its legend.

What a process sends are tokens with some choices each. With two exchanges, the tokens of the second are the pilots that
arrived in the first, and their choices are those that came with them, so both are lists with places that are empty.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tedlab.comm import Collectives, GroupKind, Issued, Splits, issue_all_to_all, once
from tedlab.comm.differentiable import all_to_all
from tedlab.moe.gather import gather_rows, sum_rows
from tedlab.moe.index_ops import inverse
from tedlab.moe.products import index_functions
from tedlab.moe.slots import sort_choices

_NAMES: dict[GroupKind, tuple[str, str]] = {  # of rows, and after those of all else
    "expert": ("all_to_all", ""),
    "expert_between_nodes": ("between_nodes", "_between_nodes"),
    "expert_in_node": ("in_node", "_in_node"),
}


class Numbered(NamedTuple):
    """Choices, numbered among those that their token has in the same process.

    Attributes:
        expert_TK: The expert of each; -1: there is none.
        experts: Number of experts of a process.
        number_TK: The number of each; that with number 0 stands for the pilot.
        upto_sT: (processes, T) how many of the tokens up to each send a pilot to each process.
        pilots_s: (processes,) the number of pilots that go to each.
    """

    expert_TK: Tensor
    experts: int
    number_TK: Tensor
    upto_sT: Tensor
    pilots_s: Tensor


def number_choices(expert_TK: Tensor, num_experts: int, processes: int, kernel: str = "torch") -> Numbered:
    """Numbers the choices of each token by process, and counts their pilots, which takes no sorting.

    Args:
        expert_TK: (T, K) int64, the chosen experts; -1: none.
        num_experts: Number of experts.
        processes: Number of processes that divide them evenly.
        kernel: See ``moe.kernel``.
    """
    experts = num_experts // processes
    number_TK, upto_sT = index_functions(kernel, expert_TK.device).number(expert_TK, experts, processes)
    pilots_s = upto_sT[:, -1] if len(expert_TK) else upto_sT.new_zeros(processes)
    return Numbered(expert_TK, experts, number_TK, upto_sT, pilots_s)


@dataclass(frozen=True)
class Sent:
    """The pilots and choices that this process sends, each in the order in which they leave.

    Attributes:
        token_R: (T·K,) int64: its first P numbers are the tokens of the pilots.
        pilot_TK: (T, K) int64: the pilots of each token, one for each process; -1: none.
        choice_R: (R,) int64: the choice t·K + k in each place.
        place_TK: (T, K) int64, the inverse; -1 where there is no choice.
        code_R: (R,) int64: for each choice, W · the number of its pilot among those that go to the same process, plus
            its own number among the choices of that pilot.
    """

    token_R: Tensor
    pilot_TK: Tensor
    choice_R: Tensor
    place_TK: Tensor
    code_R: Tensor


def list_choices(expert_TK: Tensor, num_experts: int, number: int) -> tuple[Tensor, Tensor]:
    """Lists choices by expert and then by token: returns the place of each (T, K), and the choice in each place (R,).

    Args:
        expert_TK: (T, K) int64, the chosen experts; -1: none.
        num_experts: Number of experts.
        number: Number R of choices.
    """
    missing_TK = expert_TK < 0
    place_TK, choice, _ = sort_choices(expert_TK.masked_fill(missing_TK, num_experts), num_experts + 1)
    return place_TK.masked_fill(missing_TK, -1), choice[:number]


def list_pilots(numbered: Numbered, most: int, listing: tuple[Tensor, Tensor], kernel: str = "torch") -> Sent:
    """Lists the pilots of tokens by process and then by token, and their choices by expert and then by token.

    Args:
        numbered: The choices.
        most: W, as in the legend.
        listing: The choices as :func:`list_choices` or the router lists them.
        kernel: See ``moe.kernel``.
    """
    expert_TK, experts, number_TK, upto_sT, _ = numbered
    pilots = index_functions(kernel, expert_TK.device).pilots(expert_TK, number_TK, upto_sT, experts, most)
    place_TK, choice_R = listing
    return Sent(pilots.token_R, pilots.pilot_TK, choice_R, place_TK, pilots.code_TK.flatten()[choice_R])


@dataclass(frozen=True)
class Told:
    """Who sends how much in one exchange.

    Attributes:
        pilots: Splits of pilots.
        choices: Splits of their choices.
        pilots_s: (processes,) int64 on the device: the pilots that each process sends here.
        choices_se: (processes, experts here) int64 on the device: the choices that each sends here, by expert.
    """

    pilots: Splits
    choices: Splits
    pilots_s: Tensor
    choices_se: Tensor


@dataclass(frozen=True)
class Arrived:
    """What arrived at this process, and what it needs to know of what it sent.

    Attributes:
        x_pH: Pilots, by sender.
        gate_q1: The weights of their choices, by sender and then by expert.
        code_q: For each choice, W · the place of its pilot plus its number.
        told: How they came.
        token_P, pilot_TK: See :class:`Sent`.
    """

    x_pH: Tensor
    gate_q1: Tensor
    code_q: Tensor
    told: Told
    token_P: Tensor
    pilot_TK: Tensor

    def choices(self, most: int) -> tuple[Tensor, Tensor]:
        """Returns the choices of each pilot: (p, W) their experts, and their places in ``gate_q1``; -1: there is none.

        Experts are numbered among those of the processes that this one passes pilots on to.
        """
        senders, experts = self.told.choices_se.shape
        each = torch.arange(experts, device=self.code_q.device).repeat(senders)
        expert_q = each.repeat_interleave(self.told.choices_se.flatten(), output_size=len(self.code_q))
        places = len(self.x_pH) * most
        expert_pW = torch.full((places,), -1, dtype=torch.int64, device=expert_q.device)
        expert_pW = expert_pW.scatter_(0, self.code_q, expert_q).view(-1, most)
        return expert_pW, inverse(self.code_q, places).view(-1, most)


class Step:
    """An exchange of pilots, each of which goes to a process of a group and returns as one row.

    Args:
        comm: The collectives of this process.
        kind: The group.
        most: W, as in the legend.
        kernel: What copies and sums rows, see ``moe.kernel``.
    """

    def __init__(self, comm: Collectives, kind: GroupKind, most: int, kernel: str) -> None:
        self.comm, self.kind, self.most, self.kernel = comm, kind, most, kernel
        self.processes = comm.size(kind)
        self.rows, self.suffix = _NAMES[kind]

    def send(self, x_TH: Tensor, gate_R1: Tensor, sent: Sent, told: Told) -> Issued[Arrived]:
        """Sends the pilots of tokens (T, H), and of their choices the numbers and weights (R, 1)."""
        comm, kind, suffix = self.comm, self.kind, self.suffix
        code_q = once(f"dispatch.choices{suffix}", lambda: self._tell(sent.code_R, told))
        token_P = sent.token_R[: sum(told.pilots.sent)]
        x_PH = gather_rows(x_TH, token_P, sent.pilot_TK, self.kernel)
        gates = all_to_all(gate_R1, comm, kind, f"dispatch.gates{suffix}", told.choices)
        there = issue_all_to_all(x_PH, comm, kind, f"dispatch.{self.rows}", told.pilots)
        return there.then(lambda x_pH: Arrived(x_pH, gates, code_q, told, token_P, sent.pilot_TK))

    def back(self, y_pH: Tensor, arrived: Arrived) -> Issued[Tensor]:
        """Sends a row back for each pilot that arrived, and returns the sums of those of each token (T, H)."""
        splits = arrived.told.pilots.reverse
        back = issue_all_to_all(y_pH, self.comm, self.kind, f"combine.{self.rows}", splits)
        return back.then(lambda y_PH: sum_rows(y_PH, arrived.token_P, arrived.pilot_TK, self.kernel))

    def _tell(self, code_R: Tensor, told: Told) -> Tensor:
        """Exchanges the numbers of choices, and counts pilots from the first that arrives here."""
        tag = f"dispatch.choices{self.suffix}"
        code_q = self.comm.all_to_all(code_R, self.kind, tag=tag, phase="forward", splits=told.choices)
        # A sender counts the pilots that it sends here from 0; they lie behind those of the senders before it.
        index = index_functions(self.kernel, code_q.device)
        moved: Tensor = index.moved_on(code_q, told.pilots_s, told.choices_se, self.most)
        return moved
