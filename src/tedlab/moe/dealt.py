"""Experts of several processes to which whole tokens come: which tokens a process sends, and what it makes of results.

Where tensor ranks hold the same tokens, either all send them, and partial sums of each token are all-reduced; or each
sends every T-th, and the results are gathered. Legend as in ``pilots.py``.
"""

from torch import Tensor

from tedlab.comm import copy_to, gather_from, reduce_from, slice_to
from tedlab.moe.experts import ExpertsSpec
from tedlab.moe.gather import chosen_experts, grown
from tedlab.moe.local import TokenExperts
from tedlab.moe.router import Routing
from tedlab.topology import Topology


class DealtExperts(TokenExperts):
    """Base of experts that obey ``comm.dedup``.

    Raises:
        ValueError: If several processes gather tokens that are dealt and reduce them in the paper's order, which
            reduces rows; and with several chunks.
    """

    def __init__(self, spec: ExpertsSpec, topology: Topology) -> None:
        super().__init__(spec, topology)
        layout, dedup = topology.layout, topology.options.dedup
        if layout.chunks > 1:
            raise ValueError(f"comm.dedup={dedup} sends all choices of a token at once: it needs comm.chunks=1")
        if layout.gathers > 1 and not layout.scattered:
            raise ValueError(f"comm.dedup={dedup} with tokens that are dealt needs comm.fuse_reduce_scatter=true")
        self.dealing, self.alike = layout.dealt, not layout.own
        self.deals, self.gathers = layout.deals, layout.gathers

    def most(self, tokens: int) -> int:
        """Returns how many of so many tokens a process sends, or the largest number if some send one more."""
        return -(-tokens // self.deals) if self.dealing else tokens

    def enter(self, x_TH: Tensor) -> Tensor:
        """Returns the tokens that this process sends."""
        if self.dealing:
            return self._hand(x_TH, "dispatch.drop")
        return copy_to(x_TH, self.comm, "expert_tensor", "experts.copy") if self.alike else x_TH

    def choices(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Returns the weights of the choices of the tokens that this process sends, and their experts."""
        gate_TK, expert_TK = routing.gate_TK, chosen_experts(routing)
        if self.dealing:
            own = slice(self.comm.rank("tensor"), None, self.deals)
            return self._hand(gate_TK, "dispatch.drop_gates"), expert_TK[own]
        if self.alike:
            gate_TK = copy_to(gate_TK, self.comm, "expert_tensor", "experts.copy_gates")
        return gate_TK, expert_TK

    def _hand(self, x: Tensor, tag: str) -> Tensor:
        """Returns every T-th token, from the one with this tensor rank's number."""
        own = len(range(self.comm.rank("tensor"), len(x), self.deals))
        x = grown(x, -(-len(x) // self.deals) * self.deals)
        return slice_to(x.unflatten(0, (-1, self.deals)), self.comm, "tensor", tag, dim=1).flatten(0, 1)[:own]

    def leave(self, y_TH: Tensor, tokens: int) -> Tensor:
        """Inverts :meth:`enter`."""
        if self.dealing:
            hand = grown(y_TH, self.most(tokens)).unsqueeze(1)
            return gather_from(hand, self.comm, "tensor", "combine.gather", dim=1).flatten(0, 1)[:tokens]
        return reduce_from(y_TH, self.comm, "expert_tensor", "experts.reduce") if self.alike else y_TH
