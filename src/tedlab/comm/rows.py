"""Computes how many rows routers without a capacity move, for the layers, the closed form and simulations.

A row is one choice of one token. A data rank lists its R = tokens · top_k rows by expert, and sends each to the process
that holds its expert. With DTD the tensor ranks deal the list like cards: row r goes to rank r mod T, so that all send
the same number of rows, and numbers of one expert's rows that differ by at most one. If T does not divide the list, it
is padded with rows of zeros for the last expert, whose results nobody reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Rows:
    """The rows that one process moves in one layer, for one micro-batch or summed over several.

    Attributes:
        sent: Rows that it sends to its expert group, itself included.
        received: Rows that it receives from its expert group.
        gathered: Rows in the buffer in which its tensor group gathers what each rank received, padded to the longest.
        computed: Rows that its experts compute.
        choices_sent, choices_received, choices_gathered: With ``comm.dedup`` what travels are pilots (see
            :mod:`tedlab.moe.pilots`), which the first three count; these count their choices in the same way.
        lent: Experts that it sends to other processes, which compute rows of these (see ``moe/lending``).
        borrowed: Experts of other processes that it receives.
        exchanges: Exchanges of lent experts, which there are only if somebody lends.
        relayed: Where rows or pilots go by way of nodes, those that reach it from nodes (see ``comm/route.py``).
        passed: The pilots that it passes on inside its node; of rows these are as many as ``relayed``.
        choices_relayed: The choices of pilots that reach it from nodes, which it passes on.
    """

    sent: int = 0
    received: int = 0
    gathered: int = 0
    computed: int = 0
    choices_sent: int = 0
    choices_received: int = 0
    choices_gathered: int = 0
    lent: int = 0
    borrowed: int = 0
    exchanges: int = 0
    relayed: int = 0
    passed: int = 0
    choices_relayed: int = 0

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __mul__(self, times: int) -> "Rows":
        return Rows(*(getattr(self, name) * times for name in self.__dataclass_fields__))


def listed(rows: int, sharers: int) -> int:
    """Returns the length of a list of rows after padding it to a multiple of ``sharers``."""
    return -(-rows // sharers) * sharers


def split_evenly(rows: int, parts: int) -> list[int]:
    """Divides ``rows`` into ``parts`` whole numbers that differ by at most one."""
    return [rows * (part + 1) // parts - rows * part // parts for part in range(parts)]


def dealt(counts: Any, sharers: int, rank: int) -> Any:
    """Returns how many rows of each expert one of the ranks that share a list gets, (…, E) like ``counts``.

    Args:
        counts: (…, E) integers, an array or a tensor: the list's rows for each of E experts, in the list's order.
        sharers: The number of ranks that share the list, T.
        rank: The rank among them, 0 … T-1.
    """
    ends = counts.cumsum(-1)
    return (ends + sharers - 1 - rank) // sharers - (ends - counts + sharers - 1 - rank) // sharers


def in_chunks(counts: Any, chunks: int) -> Any:
    """Returns how many of so many rows are in each chunk: (chunks, …). Of c rows, chunk r of R begins with row ⌊c·r/R⌋.

    Args:
        counts: (…) integers, an array or a tensor.
        chunks: The number of chunks, R.
    """
    if chunks == 1:
        return counts[None]
    on_device = isinstance(counts, torch.Tensor)
    chunk = torch.arange(chunks + 1, device=counts.device) if on_device else np.arange(chunks + 1)
    starts = counts[None] * chunk.reshape(-1, *[1] * counts.ndim) // chunks
    return starts[1:] - starts[:-1]


def hands(counts_sE: np.ndarray, sharers: int) -> np.ndarray:
    """Returns how many rows each of the ranks that share a list sends, (sharers, senders, E).

    Args:
        counts_sE: (senders, E) integers: the rows of each sender's list, without padding.
        sharers: The number of tensor ranks that send rows of their own.
    """
    counts = counts_sE.copy()
    counts[:, -1] += [listed(rows, sharers) - rows for rows in counts.sum(1)]
    return np.stack([dealt(counts, sharers, rank) for rank in range(sharers)])


def rows_of(counts_ise: np.ndarray, sent: int, rank: int, chunks: int = 1) -> Rows:
    """Returns the rows that a process moves.

    Args:
        counts_ise: (tensor ranks, senders, experts of this process) integers: the rows that arrive at each tensor
            rank; the first dimension is 1 if all receive the same.
        sent: The number of rows that the process sends.
        rank: The process's index in the first dimension.
        chunks: The number of chunks in which rows travel; each is gathered by itself.
    """
    arriving_ri = in_chunks(counts_ise, chunks).sum((2, 3))
    gathered = len(counts_ise) * int(arriving_ri.max(1).sum())
    return Rows(sent, int(arriving_ri[:, rank].sum()), gathered, int(arriving_ri.sum()))


def relayed(sent_ssx: np.ndarray, process: int, nodes: int) -> np.ndarray:
    """Returns the rows that pass through a process on their way between nodes, as ``comm/route.py`` says.

    Args:
        sent_ssx: (senders, processes, …) integers: the rows that each process of an expert group sends to each.
        process: The number of the process in its group.
        nodes: The number of nodes that the group is on, each with equally many of its processes.

    Returns:
        (processes, …): those from each node, for each process of its own node.
    """
    places = len(sent_ssx) // nodes
    node, place = divmod(process, places)
    passing = sent_ssx[place::places, node * places : (node + 1) * places]
    return passing.reshape(len(sent_ssx), *sent_ssx.shape[2:])


def rows_of_pilots(sent_sx: np.ndarray, arriving_isx: np.ndarray, rank: int) -> Rows:
    """Returns the rows that a process moves which exchanges pilots.

    Args:
        sent_sx: (processes of the expert group, experts of one + 1) integers: for each process, the choices of each of
            its experts that this process sends, and the pilots.
        arriving_isx: The same for what arrives at each tensor rank from each process, as in :func:`rows_of`.
        rank: The process's index in the first dimension.
    """
    pilots = rows_of(arriving_isx[..., -1:], int(sent_sx[:, -1].sum()), rank)
    choices = rows_of(arriving_isx[..., :-1], int(sent_sx[:, :-1].sum()), rank)
    of_choices = choices.sent, choices.received, choices.gathered
    return Rows(pilots.sent, pilots.received, pilots.gathered, choices.computed, *of_choices)


def by_node(rows: Rows, sent_nx: np.ndarray, relayed_nx: np.ndarray, places: int) -> Rows:
    """Returns the rows that a process moves which exchanges pilots by way of nodes.

    Args:
        rows: Those inside its node, see :func:`rows_of_pilots`.
        sent_nx: (nodes, places · (experts of a process + 1) + 1) integers: what this process sends to each node, as for
            :func:`rows_of_pilots` by process, and last the pilots to the node.
        relayed_nx: The same for what reaches it from each node.
        places: The number of processes of the expert group on each node.
    """
    choices = int(sent_nx[:, :-1].reshape(len(sent_nx), places, -1)[..., :-1].sum())
    return replace(
        rows,
        sent=int(sent_nx[:, -1].sum()),
        relayed=int(relayed_nx[:, -1].sum()),
        passed=rows.sent,
        choices_sent=choices,
        choices_relayed=rows.choices_sent,
    )


def pilots(counts_E: np.ndarray, tokens: int, top_k: int, processes: int) -> np.ndarray:
    """Returns how many pilots tokens send to each process, (processes,), if their choices are independent.

    If all experts are chosen equally often, a token's K choices miss a process of E/n of the E experts with the
    probability C(E - E/n, K) / C(E, K). A process whose experts are chosen more often counts as one with
    proportionally more experts, which is an assumption.

    Args:
        counts_E: The choices of each expert.
        tokens: The number of tokens.
        top_k: The number K of choices of each.
        processes: The number n of processes, which divide the experts evenly.
    """
    experts, counts_se = len(counts_E), counts_E.reshape(processes, -1)
    chosen_s = counts_se.sum(1)
    room_s = experts * chosen_s / max(1, tokens * top_k)
    missed_s = np.ones(processes)
    for k in range(top_k):
        missed_s *= np.maximum(0.0, experts - room_s - k) / (experts - k)
    least = np.maximum(counts_se.max(1), -(-chosen_s // min(top_k, counts_se.shape[1])))
    return np.clip(np.rint(tokens * (1 - missed_s)).astype(np.int64), least, np.minimum(chosen_s, tokens))


def sent_as_pilots(
    shares: Sequence[float], tokens: int, top_k: int, sharers: int, processes: int, nodes: int = 1
) -> np.ndarray:
    """Returns what each tensor rank of a data rank sends to each process: (sharers, processes, experts of one + 1).

    The last number is that of the pilots, the others are choices of each expert. With several nodes, returns what each
    sends to each node, as :func:`by_node` takes it: (sharers, nodes, …).

    Args:
        shares: (E,) proportions in which experts are chosen.
        tokens: Number of tokens of a data rank.
        top_k: Number of choices of each.
        sharers: Number of tensor ranks that send tokens of their own, of which each has every so manieth.
        processes: Number of processes of an expert group.
        nodes: Number of nodes that they are on, if pilots go by way of these.
    """
    found = []
    for rank in range(sharers):
        own = len(range(rank, tokens, sharers))
        counts_E = spread(shares, own * top_k, own)
        of_pilots = pilots(counts_E, own, top_k, processes)
        sent = np.concatenate((counts_E.reshape(processes, -1), of_pilots[:, None]), 1)
        if nodes > 1:
            of_nodes = pilots(counts_E, own, top_k, nodes)
            sent = np.concatenate((sent.reshape(nodes, -1), of_nodes[:, None]), 1)
        found.append(sent)
    return np.stack(found)


def spread(shares: Sequence[float], rows: int, most: int) -> np.ndarray:
    """Divides ``rows`` into whole numbers as close to proportional to ``shares`` as possible.

    Args:
        shares: (E,) non-negative numbers of any sum.
        rows: The sum of the result, at most E · ``most``.
        most: The largest number for one expert: the number of tokens, since a token chooses an expert only once.

    Returns:
        (E,) int64.

    Raises:
        ValueError: If there is no such division.
    """
    weights = np.asarray(shares, dtype=float)
    if not np.all(np.isfinite(weights) & (weights >= 0)) or rows > len(weights) * most:
        raise ValueError(f"{rows} rows cannot be divided in proportion to {weights}, with at most {most} for each")
    weights = np.ldexp(weights, -int(np.frexp(weights.max(initial=0.0))[1]))  # scaled by a power of 2 for a finite sum
    counts = np.zeros(len(weights), dtype=np.int64)
    while (left := rows - int(counts.sum())) > 0:
        room = most - counts
        open_weights = np.where(room > 0, weights, 0.0)
        if open_weights.sum() == 0.0:  # all experts with weight are full
            open_weights = (room > 0).astype(float)
        wanted = open_weights / open_weights.sum() * left
        added = np.minimum(wanted.astype(np.int64), room)
        if not added.any():  # only fractions are left: the largest ones first
            first = np.argsort(-np.where(room > 0, wanted, -1.0), kind="stable")[:left]
            added[first] = np.minimum(1, room[first])
        counts += added
    return counts
