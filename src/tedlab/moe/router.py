"""The router: which experts a token goes to, with which weight, and into which slot of the dispatch buffer.

Legend: T tokens of this data rank's micro-batch, H hidden, E experts (all of them), K choices per token, C capacity.
Every tensor rank routes the same tokens with the same weights and so decides the same; with sequence parallelism each
routes the tokens of its own positions, and T counts these. A recomputed forward pass decides as the first one did.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tedlab.comm import pin, reduce_from
from tedlab.config import MoEConfig
from tedlab.nn import Init, ShardedModule
from tedlab.topology import Topology


class RouterReport(NamedTuple):
    """What training wants to know of one MoE layer's routing.

    Attributes:
        balance_loss: load-balancing loss of this micro-batch, before its coefficient; scalar, differentiable.
        z_loss: router z-loss of this micro-batch, before its coefficient; scalar, differentiable.
        load: (E,) choices that fell on each expert, before capacity; int64.
        dropped: choices that found no slot; int64 scalar.
    """

    balance_loss: Tensor
    z_loss: Tensor
    load: Tensor
    dropped: Tensor


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
        gate_TK: weight of each choice in the combination.
        slot_TK: position of each choice in the dispatch buffer of E·C slots; -1: dropped.
        choice_EC: the inverse: which choice (index into T·K) fills each slot; -1: empty.
        report: losses and counts.
    """

    gate_TK: Tensor
    slot_TK: Tensor
    choice_EC: Tensor
    report: RouterReport


class Decision(NamedTuple):
    """What a gating rule makes of the logits of one micro-batch.

    Attributes:
        gate_TK, slot_TK, choice_EC: see :class:`Routing`.
        probs_TE: probability of each expert for each token.
        counted_TE: the choices that the load-balancing loss counts.
        load: see :class:`RouterReport`.
    """

    gate_TK: Tensor
    slot_TK: Tensor
    choice_EC: Tensor
    probs_TE: Tensor
    counted_TE: Tensor
    load: Tensor

    @property
    def balance_loss(counted_E: Tensor, probs_E: Tensor) -> Tensor:
    """E·Σ f_e·P_e: f_e the counted choices of expert e per token, P_e its mean probability (both without drops)."""
    return len(probs_E) * (counted_E * probs_E).sum()


def expert_capacity(tokens: int, num_experts: int, top_k: int, factor: float | None, multiple: int) -> int:
    """Slots that each expert offers to one data rank's micro-batch.

    ceil(top_k · tokens / num_experts · factor), rounded up to a multiple; with ``factor=None`` as many as there are
    tokens, rounded up likewise, so that none is ever dropped. The same in every layout.
    """
    # Exact: in floating point 10 × 1.1 is a little more than 11, and would be rounded up to 12.
    wanted = tokens if factor is None else math.ceil(top_k * tokens * Fraction(str(factor)) / num_experts)
    return -(-wanted // multiple) * multiple


def assign_slots(expert_TK: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gives each choice the next free slot of its expert, first choices first, then in order of the tokens.

    Args:
        expert_TK: (T, K) int64, the chosen experts.
        num_experts: E.
        capacity: C, slots per expert.

    Returns:
        slot_TK (T, K), choice_EC (E·C,), load_E (E,): see :class:`Routing` and :class:`RouterReport`. All shapes are
        known beforehand, so nothing waits for the device.
    """
    tokens, top_k = expert_TK.shape
    expert = expert_TK.t().flatten()  # (K·T,): all first choices, then all second ones
    load_E = torch.zeros(num_experts, dtype=torch.int64, device=expert.device)
    load_E.scatter_add_(0, expert, torch.ones_like(expert))

    # A stable sort lines the choices up by expert; the distance to the expert's first one is the position in it.
    order = expert.argsort(stable=True)
    first_E = load_E.cumsum(0) - load_E
    place = torch.arange(tokens * top_k, device=expert.device)
    position = torch.empty_like(expert).scatter_(0, order, place - first_E[expert[order]])
    slot = torch.where(position < capacity, expert * capacity + position, -1)
    slot_TK = slot.view(top_k, tokens).t().contiguous()
    return slot_TK, choices_of_slots(slot_TK, num_experts * capacity), load_E


def choices_of_slots(slot_TK: Tensor, slots: int) -> Tensor:
    """The inverse of ``slot_TK``: which choice fills each of E·C slots, see :class:`Routing`."""
    # Dropped choices are written to one slot past the end, which is cut off.
    slot = slot_TK.flatten()
    choice_EC = torch.full((slots + 1,), -1, dtype=torch.int64, device=slot.device)
    choice_EC.scatter_(0, slot.masked_fill(slot < 0, slots), torch.arange(len(slot), device=slot.device))
    return choice_EC[:slots]
