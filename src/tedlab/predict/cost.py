"""Computes what a collective costs on a given cluster: seconds, and bytes by the kind of link they take.

This is a hierarchical α–β model: every link has a latency α and a bandwidth, and a node's GPUs share its network. Ranks
fill nodes in order, ``gpus_per_node`` each. Nothing here communicates or knows about models.

The notation, for a group of n ranks on m nodes with a buffer of P bytes on each rank (the input of an all-reduce, a
reduce-scatter or an all-to-all, the output of an all-gather), is:

- B: bandwidth of one GPU inside its node × its efficiency; N: bandwidth of a whole node's network × its efficiency;
- α_in, α_out: latency of one step inside a node and between nodes.

**All groups of a kind communicate at the same time.** While this group runs a collective, so do its siblings, which are
the groups of the same size and stride in the rest of the cluster, and a node's network carries all that its ranks send
out. (With tensor = 4, four data groups leave every node at once.)

**Rings** (all-reduce, all-gather, reduce-scatter). Each rank passes V = r·P·(n−1)/n bytes to the next one in r·(n−1)
steps, where r = 2 for an all-reduce and 1 otherwise. A ring leaves each of its m nodes once, however many members it
has there, and is as fast as its slowest link. If s groups leave the busiest node,

    seconds = r·((n−m)·α_in + (m−1)·α_out) + max(V / B, s·V / N)

With k members on each node of g GPUs, s = g/k: a GPU's share of the network is N/g, and a ring has k such shares.

**All-to-all.** A rank with k members of its group on its own node (itself included) sends P·(k−1)/n bytes inside the
node and P·(n−k)/n out of it. The two parts overlap, and all messages leave together:

    seconds = max(α_in + P·(k−1)/n / B, α_out + (sum of P·(n−k)/n over the ranks of the busiest node) / N)

A part without bytes to send costs nothing; a group of one costs nothing. Where a link has measured rates
(``all_to_all``), each part is interpolated between their seconds: see
:func:`tedlab.predict.cluster.seconds_through`.

**Measured collectives** (``cluster.collectives``, from ``tedlab calibrate``) replace these formulas for groups of the
same operation, n and m: seconds are interpolated between those of measured rates by V, the bytes that a rank sends
(P·(n−1)/n in an all-to-all), or are latency + V / bandwidth. Measured ``waits`` say how long a rank waits for the
slowest of n on m nodes; without them, all ranks are equally fast.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from tedlab.predict.cluster import ClusterConfig

if TYPE_CHECKING:  # keeps comm free to import this module
    from tedlab.comm.collectives import Operation

LinkClass = Literal["in_node", "between_nodes"]


def collective_seconds(op: "Operation", payload_bytes: float, members: Sequence[int], cluster: ClusterConfig) -> float:
    """Returns the seconds that one collective takes, by the formulas at the top of this module.

    Args:
        op: The operation.
        payload_bytes: Bytes in the buffer of each rank (P).
        members: The global ranks of the group, evenly spaced; a ``range`` is cheapest.
        cluster: The cluster that they are on.

    Raises:
        ValueError: If the ranks are not evenly spaced, or exceed those of the cluster's only node.
    """
    if len(members) == 1:
        return 0.0
    place = placement_of(_as_range(members), cluster.gpus_per_node)
    if cluster.between_nodes is None and members[-1] >= cluster.gpus_per_node:
        raise ValueError(
            f"there is no rank {members[-1]} on this cluster: it is one node of {cluster.gpus_per_node} "
            "(between_nodes is null). Use fewer ranks, or a cluster of several nodes"
        )
    return cluster.slower.collectives * _seconds(op, payload_bytes, place, cluster)


def _seconds(op: "Operation", payload_bytes: float, place: "Placement", cluster: ClusterConfig) -> float:
    passed = _wire_bytes(op, payload_bytes, place.size)
    for measured in cluster.collectives:
        if (measured.op, measured.size, measured.nodes) == (op, place.size, place.nodes):
            return measured.seconds(passed)
    inside = cluster.in_node if place.most_together > 1 else None
    outside = cluster.between_nodes if place.nodes > 1 else None
    efficiency = cluster.efficiency
    if op == "all_to_all":
        parts = []
        if inside:
            parts.append(inside.exchanging(payload_bytes * (place.most_together - 1) / place.size, efficiency.in_node))
        if outside:
            parts.append(outside.exchanging(payload_bytes * place.buffers_out, efficiency.all_to_all))
        return max(parts)
    rounds = 2 if op == "all_reduce" else 1
    latency, slowest = 0.0, 0.0
    if inside:
        latency += rounds * (place.size - place.nodes) * inside.latency
        slowest = passed / (inside.bandwidth * efficiency.in_node)
    if outside:
        latency += rounds * (place.nodes - 1) * outside.latency
        slowest = max(slowest, place.groups_out * passed / (outside.bandwidth * efficiency.between_nodes))
    return latency + slowest


def exchange_seconds(bytes_sr: np.ndarray, cluster: ClusterConfig) -> float:
    """Returns the seconds of one all-to-all in which ranks send unequal parts, by the all-to-all's formula above.

    In each part the rank that sends or receives the most decides: over its own link inside a node, and over its node's
    to others.

    Args:
        bytes_sr: (senders, receivers) bytes, of the cluster's first ranks; what stays with its rank does not count.
        cluster: The cluster.

    Raises:
        ValueError: If the ranks exceed those of the cluster's only node.
    """
    ranks = len(bytes_sr)
    if cluster.between_nodes is None and ranks > cluster.gpus_per_node:
        raise ValueError(
            f"{ranks} ranks do not fit on the only node, of {cluster.gpus_per_node} (between_nodes is null)"
        )
    moved = bytes_sr * (1.0 - np.eye(ranks))
    node = np.arange(ranks) // cluster.gpus_per_node
    inside = np.where(node[:, None] == node, moved, 0.0)
    outside = moved - inside
    parts = [0.0]
    if cluster.in_node and inside.any():
        busiest = max(inside.sum(0).max(), inside.sum(1).max())
        parts.append(cluster.in_node.exchanging(busiest, cluster.efficiency.in_node))
    if cluster.between_nodes and outside.any():
        busiest = max(np.bincount(node, outside.sum(axis)).max() for axis in (0, 1))
        parts.append(cluster.between_nodes.exchanging(busiest, cluster.efficiency.all_to_all))
    return cluster.slower.collectives * max(parts)


def waiting_seconds(since: float, members: Sequence[int], cluster: ClusterConfig) -> float:
    """Returns the seconds that a rank waits for the slowest of its group, or 0 if the cluster's ``waits`` lack it.

    Args:
        since: Seconds since the rank last communicated.
        members: The global ranks of the group, evenly spaced.
        cluster: The cluster that they are on.
    """
    if len(members) == 1:
        return 0.0
    place = placement_of(_as_range(members), cluster.gpus_per_node)
    for wait in cluster.waits:
        if (wait.size, wait.nodes) == (place.size, place.nodes):
            return wait.latency + wait.share * since
    return 0.0


def link_of(members: Sequence[int], gpus_per_node: int) -> LinkClass:
    """Returns ``in_node`` for a group inside one node, and ``between_nodes`` for one that needs the network."""
    return "in_node" if members[0] // gpus_per_node == members[-1] // gpus_per_node else "between_nodes"


def wire_bytes_by_link(
    op: "Operation", payload_bytes: float, members: Sequence[int], gpus_per_node: int
) -> dict[LinkClass, float]:
    """Returns the bytes that a rank sends in one collective, by kind of link, as the mean over the group's ranks.

    A ring's bytes take the link to the next member, so a ring over m > 1 nodes sends m/n of all bytes between nodes. In
    an all-to-all, the bytes whose receiver is on another node go between nodes. The two always add up to the wire bytes
    of the collective, which are (n−1)/n of its payload, or twice that for an all-reduce.
    """
    place = placement_of(_as_range(members), gpus_per_node)
    total = _wire_bytes(op, payload_bytes, place.size)
    if place.nodes == 1:
        return {"in_node": total, "between_nodes": 0.0}
    out = payload_bytes * place.mean_elsewhere if op == "all_to_all" else total * place.nodes / place.size
    return {"in_node": total - out, "between_nodes": out}


@dataclass(frozen=True)
class Placement:
    """How a group lies on its nodes, and what it shares them with.

    Attributes:
        size: The number of members (n).
        nodes: The number of nodes with members (m).
        most_together: The most members on one node.
        groups_out: The groups, siblings included, with members both on and off the node, for the busiest node.
        buffers_out: The all-to-all payloads that leave the busiest node when all its groups exchange at once.
        mean_elsewhere: The share of its all-to-all payload that a member sends to other nodes, mean over the members.
    """

    size: int
    nodes: int
    most_together: int
    groups_out: int
    buffers_out: float
    mean_elsewhere: float


@cache
def placement_of(members: range, gpus_per_node: int) -> Placement:
    size, stride = len(members), members.step
    block = size * stride  # consecutive ranks that a group and the siblings interleaved with it fill
    origin = (members.start - members.start % stride) % block

    def group_of(rank: int) -> range:
        first = rank - (rank - origin) % block + rank % stride
        return range(first, first + block, stride)

    @cache
    def count_by_node(group: range) -> Counter[int]:
        return Counter(rank // gpus_per_node for rank in group)

    own = count_by_node(members)
    groups_out, buffers_out = 0, 0.0
    for node in own:
        ranks = range(node * gpus_per_node, (node + 1) * gpus_per_node)
        here = {group: count_by_node(group)[node] for group in map(group_of, ranks)}
        groups_out = max(groups_out, sum(count < size for count in here.values()))
        buffers_out = max(buffers_out, sum(count * (size - count) for count in here.values()) / size)
    elsewhere = sum(count * (size - count) for count in own.values()) / size**2
    return Placement(size, len(own), max(own.values()), groups_out, buffers_out, elsewhere)


def _as_range(members: Sequence[int]) -> range:
    step = members[1] - members[0] if len(members) > 1 else 1
    spaced = range(members[0], members[0] + step * len(members), step) if step > 0 else None
    if spaced is None or (members != spaced and list(members) != list(spaced)):
        raise ValueError(f"a group's ranks must be in order and evenly spaced, as in every topology; got {members}")
    return spaced


def _wire_bytes(op: "Operation", payload_bytes: float, size: int) -> float:
    return payload_bytes * (size - 1) / size * (2 if op == "all_reduce" else 1)
