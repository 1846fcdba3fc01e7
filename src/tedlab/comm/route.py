"""How rows travel between the processes of an expert group: in one exchange, or in two by way of nodes.

With two, a row first goes between nodes, to the process that has its sender's place in the node of its expert, and then
inside the node. Results take the same way back. Rows arrive in the order in which one exchange delivers them: sorted by
sender. A message between nodes then holds what a process sends to a whole node, so there are fewer and larger ones. As
many bytes go between nodes, and more inside.

A process's number in its group is that of its node, times the number of places in a node, plus its place there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tedlab.comm.collectives import Collectives, Splits
from tedlab.comm.differentiable import all_to_all
from tedlab.comm.issued import Issued, issue_all_to_all


class Numbers(NamedTuple):
    """Numbers of rows, on the device, as every process has told those that it sends to.

    Attributes:
        sent_sx: (processes of the group, x): what this process sends to each.
        relayed_sx: The same for what passes through this process: from each node, for each process of this node. None:
            there is one exchange.
        arriving_sx: What each process sends here.
    """

    sent_sx: Tensor
    relayed_sx: Tensor | None
    arriving_sx: Tensor

    @property
    def passing(self) -> tuple[Tensor, ...]:
        """The numbers of what is sent, and of what is relayed if anything is, as (1, processes, x) each."""
        return tuple(part.unsqueeze(0) for part in (self.sent_sx, self.relayed_sx) if part is not None)


class Relay(NamedTuple):
    """How many rows travel in two exchanges.

    Attributes:
        sent: Rows sent to each process, as in :class:`Splits`.
        received: Rows received from each.
        relayed: Rows that pass through this process: from each node, for each process of this node.
        nodes: The number of nodes.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    relayed: tuple[int, ...]
    nodes: int

    @property
    def between(self) -> Splits:
        """The splits of the exchange between nodes."""
        return Splits(_by_node(self.sent, self.nodes), _by_node(self.relayed, self.nodes))

    @property
    def inside(self) -> Splits:
        """The splits of the exchange inside the node."""
        return Splits(_by_place(self.relayed, self.nodes), _by_place(self.received, self.nodes))


class Route:
    """One exchange between all processes of the group.

    Args:
        comm: The collectives of this process.
    """

    nodes = 1
    returning = "combine.all_to_all"  # the first exchange on the way back from experts

    def __init__(self, comm: Collectives) -> None:
        self.comm = comm

    def numbers(self, sent_sx: Tensor) -> Numbers:
        """Tells the others how many rows this process sends to each (processes, x), and hears what they send."""
        return Numbers(sent_sx, None, self._told(sent_sx, "expert", "dispatch.counts"))

    def splits(self, sent: Sequence[int], received: Sequence[int], relayed: Sequence[int] = ()) -> Splits | Relay:
        """Returns how rows are divided, given :class:`Numbers` on the host."""
        return Splits(tuple(sent), tuple(received))

    def there(self, x: Tensor, splits: Splits | Relay | None = None) -> Issued[Tensor]:
        """Sends rows, sorted by receiver, to experts. They arrive sorted by sender.

        Args:
            x: (rows, …).
            splits: How many go where, from :meth:`splits`; None: equally many to each process.
        """
        assert not isinstance(splits, Relay)
        return issue_all_to_all(x, self.comm, "expert", "dispatch.all_to_all", splits)

    def back(self, y: Tensor, splits: Splits | Relay | None = None) -> Issued[Tensor]:
        """Inverts :meth:`there`, with the same splits."""
        assert not isinstance(splits, Relay)
        return issue_all_to_all(
            y, self.comm, "expert", "combine.all_to_all", None if splits is None else splits.reverse
        )

    def _told(self, counts: Tensor, kind: str, tag: str) -> Tensor:
        return self.comm.all_to_all(counts, kind, tag=tag, phase="forward")  # type: ignore[arg-type]


class NodeRoute(Route):
    """Two exchanges, by way of nodes. The one between nodes is under way while others compute."""

    returning = "combine.in_node"

    def __init__(self, comm: Collectives) -> None:
        super().__init__(comm)
        self.nodes, self.places = comm.size("expert_between_nodes"), comm.size("expert_in_node")

    def numbers(self, sent_sx: Tensor) -> Numbers:
        relayed_sx = self._told(sent_sx, "expert_between_nodes", "dispatch.counts_between_nodes")
        by_place_sx = _turned(relayed_sx, self.nodes, self.places)
        arriving_sx = self._told(by_place_sx, "expert_in_node", "dispatch.counts_in_node")
        return Numbers(sent_sx, relayed_sx, _turned(arriving_sx, self.places, self.nodes))

    def splits(self, sent: Sequence[int], received: Sequence[int], relayed: Sequence[int] = ()) -> Relay:
        return Relay(tuple(sent), tuple(received), tuple(relayed), self.nodes)

    def there(self, x: Tensor, splits: Splits | Relay | None = None) -> Issued[Tensor]:
        assert not isinstance(splits, Splits)
        between, inside = (None, None) if splits is None else (splits.between, splits.inside)

        def inward(x: Tensor) -> Tensor:
            x = self._by_place(x, None if splits is None else splits.relayed)
            x = all_to_all(x, self.comm, "expert_in_node", "dispatch.in_node", inside)
            return self._by_node(x, None if splits is None else splits.received)

        far = issue_all_to_all(x, self.comm, "expert_between_nodes", "dispatch.between_nodes", between)
        return far.then(inward)

    def back(self, y: Tensor, splits: Splits | Relay | None = None) -> Issued[Tensor]:
        assert not isinstance(splits, Splits)
        between, inside = (None, None) if splits is None else (splits.between.reverse, splits.inside.reverse)
        y = self._by_place(y, None if splits is None else splits.received)
        y = all_to_all(y, self.comm, "expert_in_node", "combine.in_node", inside)
        y = self._by_node(y, None if splits is None else splits.relayed)
        return issue_all_to_all(y, self.comm, "expert_between_nodes", "combine.between_nodes", between)

    def _by_place(self, x: Tensor, sizes: Sequence[int] | None) -> Tensor:
        """Sorts rows by place and then by node; they are sorted by node and then by place, in blocks of these sizes."""
        return _turned(x, self.nodes, self.places, sizes)

    def _by_node(self, x: Tensor, sizes: Sequence[int] | None) -> Tensor:
        """Inverts :meth:`_by_place`, of the same sizes."""
        turned = None
        if sizes is not None:
            turned = [size for place in range(self.places) for size in sizes[place :: self.places]]
        return _turned(x, self.places, self.nodes, turned)


def route(comm: Collectives) -> Route:
    """Returns how rows travel in the expert group, which is by way of nodes if it has groups for that."""
    return NodeRoute(comm) if "expert_between_nodes" in comm.sizes else Route(comm)


def _turned(x: Tensor, first: int, second: int, sizes: Sequence[int] | None = None) -> Tensor:
    """Sorts blocks of rows, which are sorted by two numbers, by the second one before the first.

    Args:
        x: (rows, …).
        first, second: How many first and second numbers there are.
        sizes: The rows of each block, as they are sorted; None: all have equally many.
    """
    if sizes is None:
        return x.unflatten(0, (first, second, -1)).transpose(0, 1).flatten(0, 2)
    blocks = x.split(list(sizes))
    return torch.cat([block for number in range(second) for block in blocks[number::second]])


def _by_node(sizes: Sequence[int], nodes: int) -> tuple[int, ...]:
    places = len(sizes) // nodes
    return tuple(sum(sizes[node * places : (node + 1) * places]) for node in range(nodes))


def _by_place(sizes: Sequence[int], nodes: int) -> tuple[int, ...]:
    places = len(sizes) // nodes
    return tuple(sum(sizes[place::places]) for place in range(places))
