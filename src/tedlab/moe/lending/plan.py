"""Plans who computes which rows, as pure functions of how often each expert was chosen.

The experts of a layer are divided over P processes of an expert group, E/P to each: their *home*. All rows of an expert
have an order. Its home computes the first of them, and each process that borrows the expert a range of the others.

Two policies exist. :func:`least_loaded` is LLEP (arXiv 2601.17111, Algorithms 2 to 4): overloaded homes lend to the
processes with the fewest rows, unless loads are nearly balanced or a loan is too small to be worth its bytes.
:func:`even` gives all processes equally many rows, up to one, and each borrows from at most one home.

Legend: P processes, E experts.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Loan(NamedTuple):
    """A range of an expert's rows that another process than its home computes.

    Attributes:
        expert: The expert, 0 … E-1.
        borrower: The process, 0 … P-1.
        start, stop: The range, in the order of the expert's rows.
    """

    expert: int
    borrower: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Who computes which rows.

    Attributes:
        load_E: (E,) int64, the number of rows of each expert.
        processes: The number of processes P, which divides E.
        loans: The ranges that are computed away from home, by expert and start. The ranges of an expert end with its
            last row, and leave no gap; no process borrows an expert twice.
    """

    load_E: np.ndarray
    processes: int
    loans: tuple[Loan, ...] = ()

    def home(self, expert: int) -> int:
        """Returns the process that owns an expert."""
        return expert * self.processes // len(self.load_E)

    @property
    def kept_E(self) -> np.ndarray:
        """The number of rows of each expert that its home computes, (E,)."""
        kept_E = self.load_E.copy()
        for loan in self.loans:
            kept_E[loan.expert] -= loan.stop - loan.start
        return kept_E

    @property
    def loads_P(self) -> np.ndarray:
        """The number of rows that each process computes, (P,)."""
        loads_P = self.kept_E.reshape(self.processes, -1).sum(1)
        for loan in self.loans:
            loads_P[loan.borrower] += loan.stop - loan.start
        return loads_P

    def lent(self, process: int) -> int:
        """Returns how many copies of its experts a process sends to others."""
        return sum(self.home(loan.expert) == process for loan in self.loans)

    def borrowed(self, process: int) -> int:
        """Returns how many experts of others a process receives."""
        return sum(loan.borrower == process for loan in self.loans)


Policy = Callable[[np.ndarray, int], Plan]  # from the loads (E,) of experts and the number of processes


def least_loaded(
    load_E: np.ndarray,
    processes: int,
    *,
    threshold: float = 1.3,
    alpha: float = 1.0,
    minimum: int | np.ndarray = 1,
    keep_small: bool = True,
) -> Plan:
    """Moves rows from overloaded homes to the processes with the fewest rows.

    A process may compute ``ceil(alpha · mean)`` rows. Experts take their turn from the most loaded to the least. One
    whose home has no room for all of its rows lends the excess, range by range, each to the process with the fewest
    rows among those that have room for ``minimum`` of them.

    It differs from the authors' code where that is wrong: the limit is rounded up, so that all rows have a place and no
    process borrows an expert twice; and by default rows that are not worth a loan stay, as the paper's text has it.

    Args:
        load_E: (E,) integers, the number of rows of each expert.
        processes: The number of processes P, which divides E.
        threshold: Nothing is lent if the largest load of a process is less than this multiple of the mean.
        alpha: The limit of a process's load, as a multiple of the mean; at least 1.
        minimum: The smallest number of rows worth a loan, at least 1; or (P, P) integers, by home and borrower.
        keep_small: Whether rows stay at home for which nobody has enough room. Otherwise (the paper's Algorithm 3) the
            last rows of an expert may be fewer than the minimum, and those that fit nowhere go to the process with the
            fewest rows, which then exceeds the limit.
    """
    load_E = np.asarray(load_E, dtype=np.int64)
    plan = Plan(load_E, processes)
    rows_P = plan.loads_P  # that each process will compute, as far as is decided
    total = int(rows_P.sum())
    if processes == 1 or int(rows_P.max()) * processes < threshold * total or not total:
        return plan
    limit = math.ceil(alpha * total / processes)
    least_PP = np.broadcast_to(np.asarray(minimum, dtype=np.int64), (processes, processes))
    loans: list[Loan] = []
    for expert in np.argsort(-load_E, kind="stable").tolist():
        rows, home = int(load_E[expert]), plan.home(expert)
        if rows_P[home] <= limit or not rows:
            continue
        excess = rows - max(0, limit - (int(rows_P[home]) - rows))
        placed = _placed(excess, home, rows_P, limit, least_PP[home], keep_small)
        start = rows - sum(taken for _, taken in placed)
        rows_P[home] -= rows - start
        for borrower, taken in placed:
            loans.append(Loan(expert, borrower, start, start + taken))
            rows_P[borrower] += taken
            start += taken
    return Plan(load_E, processes, tuple(sorted(loans, key=lambda loan: (loan.expert, loan.start))))


def _placed(
    rest: int, home: int, rows_P: np.ndarray, limit: int, least_P: np.ndarray, keep_small: bool
) -> list[tuple[int, int]]:
    """Returns who takes how many of ``rest`` rows of a home that is full without them.

    Nobody is asked twice: who has taken rows is full, and while rows are left somebody is not, since the limit leaves
    room for all rows.
    """
    never = np.iinfo(np.int64).max
    now_P = rows_P.copy()
    now_P[home] = never
    taken = []
    while rest:
        rows_of_P = np.minimum(rest, limit - now_P)
        willing_P = rows_of_P >= (least_P if keep_small else np.where(rows_of_P == rest, 1, least_P))
        if willing_P.any():
            borrower = int(np.where(willing_P, now_P, never).argmin())
            rows = int(rows_of_P[borrower])
        elif keep_small:
            break
        else:
            borrower, rows = int(now_P.argmin()), rest
        taken.append((borrower, rows))
        now_P[borrower] += rows
        rest -= rows
    return taken


def even(load_E: np.ndarray, processes: int) -> Plan:
    """Gives all processes equally many rows, up to one, with at most P - 1 pairs of home and borrower.

    This is the alias method (Walker 1977): a process below the mean takes all that it lacks from one above, which may
    thereby fall below and take in its turn from another. So each borrows once, from one home, rows that are at home.

    Args:
        load_E: (E,) integers, the number of rows of each expert.
        processes: The number of processes P, which divides E.
    """
    load_E = np.asarray(load_E, dtype=np.int64)
    plan = Plan(load_E, processes)
    rows_P = plan.loads_P
    target_P = np.full(processes, rows_P.sum() // processes)
    # Where the mean is no whole number, the processes with the most rows have one more than the others.
    target_P[np.argsort(-rows_P, kind="stable")[: rows_P.sum() % processes]] += 1
    excess = (rows_P - target_P).tolist()
    below = [process for process in range(processes) if excess[process] < 0]
    above = [process for process in range(processes) if excess[process] > 0]
    kept = plan.load_E.reshape(processes, -1).copy()
    ranges: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    while below:
        borrower, home = below.pop(), above[-1]
        _take(-excess[borrower], borrower, home, kept[home], ranges)
        excess[home] += excess[borrower]
        if excess[home] <= 0:
            above.pop()
        if excess[home] < 0:
            below.append(home)
    return Plan(load_E, processes, tuple(_in_order(kept.flatten(), ranges)))


def _take(
    rows: int, borrower: int, home: int, kept_e: np.ndarray, ranges: defaultdict[int, list[tuple[int, int]]]
) -> None:
    """Takes rows from a home, of as few experts as possible: always of the one with the most rows left."""
    while rows:
        index = int(kept_e.argmax())
        taken = min(rows, int(kept_e[index]))
        ranges[home * len(kept_e) + index].append((borrower, taken))
        kept_e[index] -= taken
        rows -= taken


def _in_order(kept_E: np.ndarray, ranges: defaultdict[int, list[tuple[int, int]]]) -> Sequence[Loan]:
    loans = []
    for expert in sorted(ranges):
        start = int(kept_E[expert])
        for borrower, rows in ranges[expert]:
            loans.append(Loan(expert, borrower, start, start + rows))
            start += rows
    return loans
