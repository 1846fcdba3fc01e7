"""Lists a process's choices by slot (see ``slots.py``), so that its tokens are copied to rows in that order at once."""

import numpy as np
import torch
from torch import Tensor

from tedlab.moe.lending.slots import Slots
from tedlab.moe.router import Routing


def runs_of(slots: Slots, rank: int, sender: int) -> np.ndarray:
    """Returns what :func:`by_slot` must know: (2, V) int64.

    The second line is the number of this sender's rows in each slot. Its rows of a slot are neighbours in the list by
    expert as well; the first line is by how much later they begin there.

    Args:
        slots: The slots of a plan.
        rank: The sender's index among the tensor ranks that send rows of their own.
        sender: Its index among the processes.
    """
    counts_V = slots.counts_isV[rank, sender]
    sorted_V = counts_V[slots.order_V]
    start_V = np.empty_like(counts_V)  # of each slot, in the list by expert
    start_V[slots.order_V] = sorted_V.cumsum() - sorted_V
    return np.stack((start_V - (counts_V.cumsum() - counts_V), counts_V))


def by_slot(routing: Routing, runs_2V: Tensor) -> Routing:
    """Returns a routing without a capacity whose choices are sorted by slot instead of by expert.

    Args:
        routing: The routing of a sender.
        runs_2V: Its :func:`runs_of`, on the device.
    """
    choice_R, (shift_V, counts_V) = routing.choice_EC, runs_2V
    place = torch.arange(len(choice_R), device=choice_R.device)
    return routing.reordered(shift_V.repeat_interleave(counts_V, output_size=len(choice_R)) + place)
