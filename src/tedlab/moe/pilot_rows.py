"""How many pilots and choices a process sends, gets and passes on if all tokens choose alike: for predictions."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from tedlab.comm.rows import Rows, by_node, rows_of_pilots, sent_as_pilots
from tedlab.spec import Layout


class MovedPilots(NamedTuple):
    """The numbers of pilots and choices in one layer and micro-batch that a process knows. See ``moe/pilots.py``.

    Numbers of one process are those of the choices of each of its experts, and last of pilots (x).

    Attributes:
        sent: What it sends to each process of its expert group (s, x); by way of nodes, to each node, as
            :func:`tedlab.comm.rows.by_node` takes it.
        arriving_isx: What each process that gathers gets from each process, of its expert group or of its node.
        own: Its number among those that gather.
        relayed: What it gets from each node; None: there is one exchange.
        passed_lx: What it passes on to each process of its node; None: there is one exchange.
    """

    sent: np.ndarray
    arriving_isx: np.ndarray
    own: int
    relayed: np.ndarray | None = None
    passed_lx: np.ndarray | None = None

    @property
    def rows(self) -> Rows:
        """The rows that it moves."""
        if self.relayed is None or self.passed_lx is None:
            return rows_of_pilots(self.sent, self.arriving_isx, self.own)
        inside = rows_of_pilots(self.passed_lx, self.arriving_isx, self.own)
        return by_node(inside, self.sent, self.relayed, len(self.passed_lx))


class PilotSenders:
    """Whose pilots come to a process, if those of all data ranks are alike and tensor ranks send different ones.

    Args:
        layout: The layout.
        rank: The process's rank.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        degrees, groups = layout.degrees, layout.groups

        def tensor(ranks: Iterable[int]) -> list[int]:
            return [degrees.coordinates(sender)["tensor"] % layout.deals for sender in ranks]

        places = degrees.coordinates(rank)
        self.own, self.nodes = (places["expert_tensor"] if layout.gathers > 1 else 0), layout.nodes
        self.node, self.place = divmod(places["expert"], degrees.expert // self.nodes)
        (self.tensor,) = tensor([rank])
        gathering = groups(rank)["expert_tensor"] if layout.gathers > 1 else [rank]
        if self.nodes == 1:
            self.senders_is = np.array([tensor(groups(member)["expert"]) for member in gathering])
            return
        self.relaying_n = np.array(tensor(groups(rank)["expert_between_nodes"]))
        self.senders_iln = np.array(
            [
                [tensor(groups(near)["expert_between_nodes"]) for near in groups(member)["expert_in_node"]]
                for member in gathering
            ]
        )

    def moved(self, sent_tx: np.ndarray) -> MovedPilots:
        """Returns what the process moves.

        Args:
            sent_tx: What each tensor rank sends, as :func:`pilots_of` returns it.
        """
        if self.nodes == 1:
            return MovedPilots(sent_tx[self.tensor], sent_tx[self.senders_is, self.place], self.own)
        here_tx = sent_tx[:, self.node]  # what each tensor rank sends to this node
        of_places = here_tx[:, :-1].reshape(len(sent_tx), len(self.senders_iln[0]), -1)
        return MovedPilots(
            sent_tx[self.tensor],
            of_places[self.senders_iln, self.place].sum(2),
            self.own,
            here_tx[self.relaying_n],
            of_places[self.relaying_n].sum(0),
        )


def pilots_of(shares: Sequence[float], tokens: int, top_k: int, layout: Layout) -> np.ndarray:
    """Returns what each of the tensor ranks that deal a data rank's tokens sends, see :func:`sent_as_pilots`."""
    return sent_as_pilots(shares, tokens, top_k, layout.deals, layout.degrees.expert, layout.nodes)


def rows_of_gathered(layout: Layout, tokens: int, computed: int) -> Rows:
    """Returns the rows that a process moves where every token comes to all processes, see ``moe/gathered.py``.

    Args:
        layout: The layout.
        tokens: Number of tokens of a data rank.
        computed: Number of choices of this process's experts.
    """
    sent = -(-tokens // layout.deals) * layout.degrees.expert
    return Rows(sent=sent, gathered=sent * layout.gathers, computed=computed)
