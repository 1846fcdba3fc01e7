"""How many rows routers without a capacity move: arithmetic on counts, shared by layers, closed form and simulations.

A row is one choice of one token. A data rank lists its R = tokens · top_k rows by expert, and sends each to the process
that has its expert. With DTD the tensor ranks divide the list like a hand of cards: row r is for rank r mod T, so that
all send the same number, and of each expert's rows as many as the others or one less. A list that T does not divide is
made longer by rows of zeros for the last expert; nobody reads their results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rows:
    """What one process moves in one layer: of a micro-batch, or summed over several.

    Attributes:
        sent: rows that it sends into its expert group, itself included.
        received: rows that arrive there.
        gathered: rows in the buffer that its tensor group makes of what each was sent: all are as wide as the widest.
        computed: rows that its experts see.
    """

    sent: int = 0
    received: int = 0
    gathered: int = 0
    computed: int = 0

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __mul__(self, times: int) -> "Rows":
        return Rows(*(getattr(self, name) * times for name in self.__dataclass_fields__))


def listed(rows: int, sharers: int) -> int:
    """The length of a list of rows that so many processes can share evenly."""
    return -(-rows // sharers) * sharers


def dealt(counts: Any, sharers: int, rank: int) -> Any:
    """Of a list with ``counts`` rows of each expert, how many of each fall to one of those who share it.

    Args:
        counts: (…, E) integers, an array or a tensor; E experts in the order of the list.
        sharers: T.
        rank: of 0 … T-1.
    """
    ends = counts.cumsum(-1)
    return (ends + sharers - 1 - rank) // sharers - (ends - counts + sharers - 1 - rank) // sharers


def hands(counts_sE: np.ndarray, sharers: int) -> np.ndarray:
    """What each of those who share a list sends: (sharers, senders, E).

    Args:
        counts_sE: (senders, E), rows of each sender's list; those of its end are added here.
        sharers: tensor ranks that send rows of their own.
    """
    counts = counts_sE.copy()
    counts[:, -1] += [listed(rows, sharers) - rows for rows in counts.sum(1)]
    return np.stack([dealt(counts, sharers, rank) for rank in range(sharers)])


def rows_of(counts_ise: np.ndarray, sent: int, rank: int) -> Rows:
    """What a process moves.

    Args:
        counts_ise: (tensor ranks, senders, experts of this process): rows that arrive at each tensor rank; one tensor
            rank where all receive the same.
        sent: rows that the process sends.
        rank: of the process among the tensor ranks.
    """
    arriving = counts_ise.sum((1, 2))
    return Rows(sent, int(arriving[rank]), len(arriving) * int(arriving.max()), int(arriving.sum()))


def spread(shares: Sequence[float], rows: int, most: int) -> np.ndarray:
    """Whole numbers in proportion to ``shares`` as far as possible, that add up to ``rows``, each at most ``most``.

    Args:
        shares: (E,) not negative; none of the numbers need add up to anything.
        rows: at most E · ``most``.
        most: a token chooses an expert once, so an expert gets no more rows than there are tokens.

    Raises:
        ValueError: if there is no such division.
    """
    weights = np.asarray(shares, dtype=float)
    if not np.all(np.isfinite(weights) & (weights >= 0)) or rows > len(weights) * most:
        raise ValueError(f"{rows} rows cannot be divided in proportion to {weights}, with at most {most} for each")
    weights = np.ldexp(weights, -int(np.frexp(weights.max(initial=0.0))[1]))  # the same digits, and a finite sum
    counts = np.zeros(len(weights), dtype=np.int64)
    while (left := rows - int(counts.sum())) > 0:
        room = most - counts
        open_weights = np.where(room > 0, weights, 0.0)
        if open_weights.sum() == 0.0:  # what has weight is full
            open_weights = (room > 0).astype(float)
        wanted = open_weights / open_weights.sum() * left
        added = np.minimum(wanted.astype(np.int64), room)
        if not added.any():  # only fractions are left: the largest ones first
            first = np.argsort(-np.where(room > 0, wanted, -1.0), kind="stable")[:left]
            added[first] = np.minimum(1, room[first])
        counts += added
    return counts
