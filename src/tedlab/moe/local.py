"""Experts without a capacity that are all in each process, whole or divided by width over the tensor group.

Rows never leave the process, so that fused kernels can gather, activate and weight them, and little is kept for the
backward pass: the tokens, which the rest of the block keeps anyway, and each row's first projection. Each row's input,
activation and result are recomputed or not needed. Legend as in ``row_ops.py``.

Tensor ranks compute partial sums of each token, which one collective adds up: tokens are reduced, not rows. There is no
exchange, so duplicate token dropping has nothing to drop.

===================  ==============================================  =======================================
tensor ranks hold    before                                          after
===================  ==============================================  =======================================
all tokens           nothing; the gradients of tokens and weights    all-reduce of tokens
                     are all-reduced
tokens of their own  all-gathers of tokens, choices and weights      reduce-scatter of tokens
===================  ==============================================  =======================================
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tedlab.comm import copy_to, evaluating, gather_to, once, reduce_from, scatter_from, to_compute_dtype
from tedlab.comm.recompute import is_dead, unused
from tedlab.comm.rows import Rows
from tedlab.moe.evaluating import evaluates, weighted_sums
from tedlab.moe.experts import Experts, ExpertsSpec
from tedlab.moe.gather import chosen_experts
from tedlab.moe.grouped import Groups, one_kernel, sums_by_expert
from tedlab.moe.products import Order, Products, index_functions, products
from tedlab.moe.router import Routing
from tedlab.moe.slots import sort_choices
from tedlab.topology import Topology

_REDUCE = "experts.reduce"


class TokenExperts(Experts):
    """Base of experts without a capacity to which whole tokens come, each with all its choices that are here.

    ``moe.kernel`` says which row operations they use.
    """

    unlimited = True
    compilable = False

    def __init__(self, spec: ExpertsSpec, topology: Topology) -> None:
        super().__init__(spec, topology)
        self.kernel = spec.config.kernel
        self.moved: Rows = Rows()

    def sums(self, x_TH: Tensor, gate_TK: Tensor, order: Order, feeds: str) -> Tensor:
        """Returns this tensor rank's part of each token's weighted sum (T, H).

        Args:
            x_TH: Tokens, in the dtype of products.
            gate_TK: Weights of their choices.
            order: Order of the rows.
            feeds: Tag of the collective that the sums go into; a second pass that does not repeat it makes none.
        """
        up, up_bias, down, down_bias = (None if w is None else to_compute_dtype(w) for w in self.weights())
        computing = products(self.kernel, self.nonlinearity, x_TH, order.groups.sizes)
        of_experts = up, _flat(up_bias), down, _flat(down_bias)
        return _Mixture.apply(x_TH, gate_TK, *of_experts, order, computing, self._adds_bias, feeds)

    @property
    def _adds_bias(self) -> bool:
        """Whether this tensor rank adds the second bias to its partial sums: one does, for all."""
        return self.comm.rank("expert_tensor") == 0


class LocalExperts(TokenExperts):
    """Experts that are all in this process, which must be alone in its expert group."""

    def __init__(self, spec: ExpertsSpec, topology: Topology) -> None:
        super().__init__(spec, topology)
        self.sharded = topology.sequence_sharded

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        if not (self.training or self.sharded) and evaluates(x_TH, self.kernel):
            return reduce_from(self._evaluated(to_compute_dtype(x_TH), routing), self.comm, "expert_tensor", _REDUCE)
        x, gate_TK, order = self._enter(to_compute_dtype(x_TH), routing)
        if not evaluating():
            self.moved += Rows(*[gate_TK.numel()] * 4)
        y = self.sums(x, gate_TK, order, _REDUCE)
        if self.sharded:
            return scatter_from(y, self.comm, "expert_tensor", _REDUCE, dim=0)
        return reduce_from(y, self.comm, "expert_tensor", _REDUCE)

    def _evaluated(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Returns this tensor rank's part of each token's weighted sum (T, H), without keeping anything."""
        up, up_bias, down, down_bias = (None if w is None else to_compute_dtype(w) for w in self.weights())
        assert up is not None
        assert down is not None
        weights = up, _flat(up_bias), down, _flat(down_bias) if self._adds_bias else None
        sizes = self.comm.reader(routing.counts_E)()
        return weighted_sums(x_TH, *routing[:3], sizes, weights, self.nonlinearity)

    def _enter(self, x_TH: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Order]:
        """Returns the tokens of which this rank computes a part, the weights of their choices, and their rows."""
        comm, gate_TK, places, choice_N, load = self.comm, routing.gate_TK, *routing[1:3], routing.counts_E
        if self.sharded:
            own_TK = chosen_experts(routing)
            expert_TK = once(
                "dispatch.gather_choices",
                lambda: comm.all_gather(own_TK, "expert_tensor", tag="dispatch.gather_choices", phase="forward"),
            )
            places, choice_N, load = sort_choices(expert_TK, self.num_experts)
            x_TH = gather_to(x_TH, comm, "expert_tensor", "dispatch.gather", dim=0)
            gate_TK = gather_to(gate_TK, comm, "expert_tensor", "dispatch.gather_gates", dim=0)
        else:
            x_TH = copy_to(x_TH, comm, "expert_tensor", "experts.copy")
            gate_TK = copy_to(gate_TK, comm, "expert_tensor", "experts.copy_gates")
        # If products need the numbers of rows, the host waits for the device, except in recomputation.
        sizes = None if one_kernel(x_TH, *self.widths) else once("experts.sizes", lambda: tuple(comm.reader(load)()))
        rows, index = places.numel(), index_functions(self.kernel, load.device)
        runs = index.runs(load.view(1, 1, -1), rows, rows, whole=False)
        token_N = choice_N.div(places.shape[1], rounding_mode="floor")
        groups = Groups(runs.expert_N, runs.ends_e, sizes)
        return x_TH, gate_TK, Order(token_N, choice_N, places, runs.expert_N[places], groups)


def _flat(bias_e1F: Tensor | None) -> Tensor | None:
    return None if bias_e1F is None else bias_e1F.squeeze(1)


class _Mixture(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        gate_TK: Tensor,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        order: Order,
        computing: Products,
        adds_bias: bool,
        feeds: str,
    ) -> Tensor:
        dead = is_dead(feeds)
        z, y_NH = computing.forward(x_TH, up, up_bias, down, order, whole=not dead)
        ctx.save_for_backward(x_TH, gate_TK, up, up_bias, down, down_bias, z)
        ctx.order, ctx.computing, ctx.adds_bias = order, computing, adds_bias
        if dead:
            return unused(x_TH.shape, x_TH)
        added = down_bias if adds_bias else None
        return computing.rows.combine(y_NH, order.place_TK, gate_TK, added, order.expert_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_TK, up, up_bias, down, down_bias, z = ctx.saved_tensors
        order, computing, grad_TH = ctx.order, ctx.computing, grads[0].contiguous()
        gate_N = gate_TK.flatten()[order.choice_N]
        grad_NH, grad_z, grad_gate_N, grad_up, grad_down = computing.backward(
            grad_TH, x, z, up, up_bias, down, gate_N, order, (ctx.needs_input_grad[2], ctx.needs_input_grad[4])
        )
        grad_x = computing.rows.combine(grad_NH, order.place_TK, None, None, order.expert_TK)
        grad_gate = torch.zeros_like(gate_TK).flatten().scatter_(0, order.choice_N, grad_gate_N).view_as(gate_TK)
        grad_up_bias = grad_down_bias = None
        if up_bias is not None:
            grad_up_bias = sums_by_expert(grad_z, order.groups.expert_N, len(up))
        if down_bias is not None:
            each = torch.arange(len(up), device=x.device)
            # The gates of each token by expert: the bias is added gate times.
            gate_TE = (order.expert_TK.unsqueeze(-1) == each) * gate_TK.unsqueeze(-1)
            # Every tensor rank holds the whole gradient of the sums, and hence of the bias, whoever adds it.
            grad_down_bias = gate_TE.sum(1).to(grad_TH.dtype).mT @ grad_TH
            if ctx.adds_bias:
                products_TE = (grad_TH @ down_bias.mT).to(gate_TK.dtype)
                grad_gate = grad_gate + products_TE.gather(1, order.expert_TK)
        return grad_x, grad_gate, grad_up, grad_up_bias, grad_down, grad_down_bias, None, None, None, None
