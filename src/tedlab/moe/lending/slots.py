"""Turns a plan into numbers of rows: what each process sends to whom, and in which order.

Each process has a *slot* for each of its experts and after these one for each that it borrows, by expert. Rows are
listed by slot instead of by expert; everything else about rows stays as it is without lending.

Legend as in ``ragged.py``, and P: processes; V: slots of all processes, in their order.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from tedlab.moe.lending.plan import Plan


@dataclass(frozen=True)
class Slots:
    """The slots of a plan, and the rows in them.

    Attributes:
        expert_V: (V,) int64, the expert of each slot. Slots of one expert have its rows in their order.
        first_P: The index of each process's first slot, and at the end V.
        counts_isV: (i, s, V) int64: rows by tensor rank, sender and slot.
        order_V: (V,) int64, the slots sorted by expert, in the order of its rows.
    """

    expert_V: np.ndarray
    first_P: tuple[int, ...]
    counts_isV: np.ndarray
    order_V: np.ndarray

    def of(self, process: int) -> slice:
        """Returns the slots of a process."""
        return slice(self.first_P[process], self.first_P[process + 1])


def slots_of(plan: Plan, counts_isE: np.ndarray) -> Slots:
    """Divides the rows of each sender as the plan divides those of each expert.

    The rows of an expert are ordered by sender. If several tensor ranks send rows of their own, each range has rows of
    all of them in proportion to what is left, so that they stay equally busy.

    Args:
        plan: A plan for the loads ``counts_isE.sum((0, 1))``.
        counts_isE: (i, s, E) integers: rows by tensor rank, sender and expert.
    """
    experts, processes = len(plan.load_E), plan.processes
    local = experts // processes
    borrowed: list[list[int]] = [[] for _ in range(processes)]  # indices of loans; sorted by expert as the plan is
    for number, loan in enumerate(plan.loans):
        borrowed[loan.borrower].append(number)
    first_P = tuple(accumulate((local + len(numbers) for numbers in borrowed), initial=0))
    expert_V = np.empty(first_P[-1], dtype=np.int64)
    slot_E, slot_of_loan = np.empty(experts, dtype=np.int64), [0] * len(plan.loans)
    for process, (first, numbers) in enumerate(zip(first_P, borrowed, strict=False)):
        native = slice(process * local, (process + 1) * local)
        expert_V[first : first + local] = np.arange(native.start, native.stop)
        slot_E[native] = np.arange(first, first + local)
        for slot, number in enumerate(numbers, first + local):
            expert_V[slot], slot_of_loan[number] = plan.loans[number].expert, slot
    counts_isV = np.zeros((*counts_isE.shape[:2], len(expert_V)), dtype=np.int64)
    counts_isV[:, :, slot_E] = counts_isE
    by_expert: dict[int, list[int]] = {}
    for number, loan in enumerate(plan.loans):
        by_expert.setdefault(loan.expert, []).append(number)
    kept_E = plan.kept_E
    position_V = np.zeros(len(expert_V), dtype=np.int64)  # among the slots of its expert
    for expert, numbers in by_expert.items():
        ranges = [int(kept_E[expert]), *(plan.loans[n].stop - plan.loans[n].start for n in numbers)]
        slots = [int(slot_E[expert]), *(slot_of_loan[n] for n in numbers)]
        counts_isV[:, :, slots] = _divided(counts_isE[:, :, expert], ranges)
        position_V[slots] = np.arange(len(slots))
    return Slots(expert_V, first_P, counts_isV, np.lexsort((position_V, expert_V)))


def _divided(counts_is: np.ndarray, ranges: list[int]) -> np.ndarray:
    """Divides an expert's rows into consecutive ranges: (i, s, ranges)."""
    left_i = counts_is.sum(1)
    stops = [np.zeros_like(left_i)]  # of each tensor rank's rows, after each range
    for rows in ranges:
        ends = left_i.cumsum()
        until = rows * ends // max(int(ends[-1]), 1)
        taken_i = np.diff(until, prepend=0)  # in proportion, and as many as rows in all
        left_i = left_i - taken_i
        stops.append(stops[-1] + taken_i)
    begin_is = counts_is.cumsum(1) - counts_is
    parts = []
    for start_i, stop_i in pairwise(stops):
        low = np.maximum(begin_is, start_i[:, None])
        high = np.minimum(begin_is + counts_is, stop_i[:, None])
        parts.append(np.maximum(high - low, 0))
    return np.stack(parts, -1)
