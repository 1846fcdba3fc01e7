"""Slots: which choices an expert takes, and where they lie. Legend as in ``router.py``."""

import torch
from torch import Tensor


def assign_slots(
    expert_TK: Tensor, num_experts: int, capacity: int, priority_TK: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gives each choice its expert's next free slot, first choices first, then in order of the tokens.

    Args:
        expert_TK: (T, K) int64, the chosen experts.
        num_experts: Number of experts E.
        capacity: Slots per expert, C.
        priority_TK: If given, choices of higher priority come first; among equal ones the order is as above.

    Returns:
        slot_TK (T, K), choice_EC (E·C,), load_E (E,): see :class:`tedlab.moe.Routing` and
        :class:`tedlab.moe.RouterReport`. All shapes are known beforehand, so nothing waits for the device.
    """
    tokens, top_k = expert_TK.shape
    expert = expert_TK.t().flatten()  # (K·T,): all first choices, then all second ones
    load_E = histogram(expert, num_experts)

    # After a stable sort by expert, a choice's position is its distance to its expert's first choice.
    if priority_TK is None:
        order = expert.argsort(stable=True)
    else:
        by_priority = priority_TK.t().flatten().argsort(descending=True, stable=True)
        order = by_priority[expert[by_priority].argsort(stable=True)]
    first_E = load_E.cumsum(0) - load_E
    place = torch.arange(tokens * top_k, device=expert.device)
    position = torch.empty_like(expert).scatter_(0, order, place - first_E[expert[order]])
    slot = torch.where(position < capacity, expert * capacity + position, -1)
    slot_TK = slot.view(top_k, tokens).t().contiguous()
    return slot_TK, choices_of_slots(slot_TK, num_experts * capacity), load_E


def sort_choices(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts all choices by expert, and for each expert by token.

    Args:
        expert_TK: (T, K) int64, the chosen experts.
        num_experts: Number of experts E.

    Returns:
        The place of each choice (T, K), the choice in each place (T·K,), and load_E.
    """
    expert = expert_TK.flatten()
    # Narrow keys sort faster: a radix sort passes over them once per byte.
    choice = expert.to(_narrowest(num_experts - 1)).argsort(stable=True)
    place = torch.empty_like(choice).scatter_(0, choice, torch.arange(len(choice), device=choice.device))
    return place.view_as(expert_TK), choice, histogram(expert, num_experts)


def _narrowest(largest: int) -> torch.dtype:
    """Returns the smallest dtype of integers from 0 to ``largest``."""
    return next(dtype for dtype in (torch.uint8, torch.int16, torch.int32) if largest <= torch.iinfo(dtype).max)


def histogram(expert: Tensor, num_experts: int, counting: Tensor | None = None) -> Tensor:
    """Counts how often each expert is in ``expert``, where ``counting`` is true if given: (E,) int64."""
    load_E = torch.zeros(num_experts, dtype=torch.int64, device=expert.device)
    return load_E.scatter_add_(0, expert, torch.ones_like(expert) if counting is None else counting.to(expert.dtype))


def choices_of_slots(slot_TK: Tensor, slots: int) -> Tensor:
    """Inverts ``slot_TK``: returns which choice fills each of E·C slots, see :class:`tedlab.moe.Routing`."""
    # Dropped choices are written to one slot past the end, which is cut off.
    slot = slot_TK.flatten()
    choice_EC = torch.full((slots + 1,), -1, dtype=torch.int64, device=slot.device)
    choice_EC.scatter_(0, slot.masked_fill(slot < 0, slots), torch.arange(len(slot), device=slot.device))
    return choice_EC[:slots]
