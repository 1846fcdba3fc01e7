"""A token path without a capacity that gives every token of an expert group to each of its processes.

An all-gather brings the tokens, the numbers of their chosen experts and the weights of the choices. Each process
computes the weighted sums of what its own experts make of them, and a reduce-scatter adds these up and returns them.
Whatever is chosen, the same bytes are sent, and all sizes are known before routers choose: no process tells another how
much to expect, and the host waits for nothing. Where a token has about as many choices as the group has processes, it
would go to nearly all of these anyway.

Products of rows that are one kernel (bf16) compute in room for all choices that there can be: a token has at most
min(K, e) here. Rows behind the last are left as they are, and nobody reads them. Other products need the number of rows
of each expert, for which the host does wait.

=================  ===========================================================================================
mode               tokens
=================  ===========================================================================================
plain TED          every tensor rank gathers all tokens, computes partial sums, and gets back those of its own,
                   which are all-reduced
DTD, fused         tensor rank r mod T gathers those of token r from its expert group, and the result from its
                   tensor group; two reduce-scatters return the sums, which are gathered at the end
sequence parallel  as with DTD, but each tensor rank has its own tokens from the beginning
folded (T_e ≠ T)   as DTD, fused, or sequence; the expert_tensor group gathers and reduces, if T_e > 1
=================  ===========================================================================================

Legend as in ``products.py``, and O: tokens that this process sends; X: those that all processes of both groups send.
"""

import torch.nn.functional as F
from torch import Tensor

from tedlab.comm import (
    Issued,
    evaluating,
    gather_to,
    issue_gather_to,
    issue_scatter_from,
    once,
    recomputing,
    scatter_from,
    to_compute_dtype,
)
from tedlab.comm.rows import Rows
from tedlab.moe.dealt import DealtExperts
from tedlab.moe.experts import ExpertsSpec
from tedlab.moe.gather import grown
from tedlab.moe.grouped import Groups, native, one_kernel
from tedlab.moe.products import Order
from tedlab.moe.router import Routing
from tedlab.moe.slots import sort_choices
from tedlab.topology import Topology


class GatheredExperts(DealtExperts):
    """Experts of several processes, each of which gets all tokens of its expert group."""

    def __init__(self, spec: ExpertsSpec, topology: Topology) -> None:
        super().__init__(spec, topology)
        self.processes, self.agreement = topology.degrees.expert, topology.slots
        self.here = self.num_experts // self.processes
        self.feeds = "experts.reduce" if self.gathers > 1 else topology.layout.returning

    def expect(self, tokens: int, slots: int) -> None:
        self.agreement.expect(self, tokens, self.most(tokens), gathered=True)

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        return self.answer(self.start(x_TH), routing).wait()

    def start(self, x_TH: Tensor) -> list[Issued[Tensor]]:
        x = self.enter(to_compute_dtype(x_TH))
        each = self.agreement.largest(self.most(len(x_TH)))
        return [issue_gather_to(grown(x, each), self.comm, "expert", "dispatch.all_gather")]

    def answer(self, sent: list[Issued[Tensor]], routing: Routing) -> Issued[Tensor]:
        gate, expert = self.choices(routing)
        x_XH, tokens, own = sent[0].wait(), len(routing.gate_TK), len(gate)
        each = len(x_XH) // self.processes
        if self.gathers > 1:
            x_XH = gather_to(x_XH, self.comm, "expert_tensor", "dispatch.gather", dim=0)
        expert = F.pad(expert, (0, 0, 0, each - own), value=-1)
        expert_XK = once("dispatch.all_gather_choices", lambda: self._of_all(expert))
        gate_XK = self._weights(grown(gate, each))
        order = self._order(x_XH, expert_XK)
        if not evaluating() and not recomputing():
            rows = each * self.processes
            self.moved += Rows(sent=rows, gathered=rows * self.gathers, computed=len(order.token_N))
        # Weights of choices elsewhere must be 0, and get no gradient, whatever is in rows that nobody computes.
        y_XH = self.sums(x_XH, gate_XK.masked_fill(order.place_TK < 0, 0.0), order, self.feeds)
        if self.gathers > 1:
            y_XH = scatter_from(y_XH, self.comm, "expert_tensor", "experts.reduce", dim=0)
        back = issue_scatter_from(y_XH, self.comm, "expert", "combine.reduce_scatter")
        return back.then(lambda y_OH: self.leave(y_OH[:own], tokens))

    def _weights(self, gate_OK: Tensor) -> Tensor:
        """Returns the weights of the choices of all processes."""
        gate = gather_to(gate_OK, self.comm, "expert", "dispatch.all_gather_gates", dim=0)
        return gather_to(gate, self.comm, "expert_tensor", "dispatch.gather_gates", dim=0) if self.gathers > 1 else gate

    def _of_all(self, expert_OK: Tensor) -> Tensor:
        """Returns the choices of all processes."""
        comm, found = self.comm, expert_OK
        found = comm.all_gather(found, "expert", tag="dispatch.all_gather_choices", phase="forward")
        if self.gathers == 1:
            return found
        return comm.all_gather(found, "expert_tensor", tag="dispatch.gather_choices", phase="forward")

    def _order(self, x: Tensor, expert_XK: Tensor) -> Order:
        """Returns the order in which this process's experts compute what chose them, with room for more in bf16."""
        own_XK = expert_XK - self.here * self.comm.rank("expert")
        elsewhere_XK = (own_XK < 0) | (own_XK >= self.here)
        own_XK = own_XK.masked_fill(elsewhere_XK, self.here)  # sorted behind all others
        place_XK, choice, load = sort_choices(own_XK, self.here + 1)
        load_e, top_k = load[:-1], expert_XK.shape[1]
        roomy = not self.bias and native(x.dtype, *self.widths)
        sizes, rows = None, len(expert_XK) * min(top_k, self.here)
        if not roomy or not one_kernel(x, *self.widths):
            sizes = once("experts.sizes", lambda: tuple(self.comm.reader(load_e)()))
            rows = rows if roomy else sum(sizes)
        choice_N = choice[:rows]
        expert_N = own_XK.flatten()[choice_N]
        token_N = choice_N.div(top_k, rounding_mode="floor")
        if roomy:
            unused_N = expert_N == self.here
            expert_N, token_N = expert_N.masked_fill(unused_N, -1), token_N.masked_fill(unused_N, -1)
        groups = Groups(expert_N, load_e.cumsum(0).int(), sizes)
        return Order(token_N, choice_N, place_XK.masked_fill(elsewhere_XK, -1), own_XK % self.here, groups)
