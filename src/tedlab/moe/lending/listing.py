"""Lists a process's choices by slot (see ``slots.py``), so that its tokens are copied to rows in that order at once."""

import numpy as np
import torch

from tedlab.moe.lending.slots import Slots
from tedlab.moe.router import Routing


def by_slot(routing: Routing, slots: Slots, rank: int, sender: int) -> Routing:
    """Returns a routing without a capacity whose choices are sorted by slot instead of by expert.

    Args:
        routing: The routing of a sender.
        slots: The slots of a plan.
        rank: The sender's index among the tensor ranks that send rows of their own.
        sender: Its index among the processes.
    """
    counts_V = slots.counts_isV[rank, sender]
    sorted_V = counts_V[slots.order_V]
    start_V = np.empty_like(counts_V)  # of each slot, in the list by expert
    start_V[slots.order_V] = sorted_V.cumsum() - sorted_V
    shift_V = start_V - (counts_V.cumsum() - counts_V)
    choice_R = routing.choice_EC
    shift, counts = torch.tensor([shift_V.tolist(), counts_V.tolist()], device=choice_R.device)
    place = torch.arange(len(choice_R), device=choice_R.device)
    return routing.reordered(shift.repeat_interleave(counts, output_size=len(choice_R)) + place)
