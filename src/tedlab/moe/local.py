"""Experts without a capacity that are all in one process and undivided.

Rows never leave the process, so that fused kernels can gather, activate and weight them, and little is kept for the
backward pass: the tokens, which the rest of the block keeps anyway, and each row's first projection. Each row's input,
activation and result are recomputed or not needed. Legend as in ``row_ops.py``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tedlab.comm import once, to_compute_dtype
from tedlab.comm.rows import Rows
from tedlab.degrees import ParallelDegrees
from tedlab.moe.experts import Experts, ExpertsSpec, RowExperts, mixtures
from tedlab.moe.grouped import Groups, one_kernel, sums_by_expert
from tedlab.moe.products import Order, Products, products
from tedlab.moe.router import Routing
from tedlab.topology import Topology


class LocalExperts(Experts):
    """Experts that are all in this process and take every token that chooses them.

    The process must be alone in its expert and tensor groups. ``moe.kernel`` says which row operations it uses.

    Attributes:
        row_ops: Row operations in place of those; None: those.
    """

    unlimited = True
    compilable = False

    def __init__(self, spec: ExpertsSpec, topology: Topology) -> None:
        super().__init__(spec, topology)
        self.kernel = spec.config.kernel
        self.moved: Rows = Rows()
        self.row_ops: Any | None = None

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        x = to_compute_dtype(x_TH)
        up, up_bias, down, down_bias = (None if w is None else to_compute_dtype(w) for w in self.weights())
        if self.row_ops is None:
            computing = products(self.kernel, self.nonlinearity, x)
        else:
            computing = Products(self.row_ops, self.nonlinearity)
        rows = routing.slot_TK.numel()
        if torch.is_grad_enabled():
            self.moved += Rows(rows, rows, rows, rows)
        return _Mixture.apply(
            x, routing.gate_TK, up, _flat(up_bias), down, _flat(down_bias), self._order(x, routing), computing
        )

    def _order(self, x: Tensor, routing: Routing) -> Order:
        load, choices = routing.counts_E, routing.slot_TK.shape[1]
        # If products need the numbers of rows, the host waits for the device, except in recomputation.
        sizes = None if one_kernel(x, *self.widths) else once("experts.sizes", lambda: tuple(self.comm.reader(load)()))
        ends = load.cumsum(0).int()
        each = torch.arange(len(load), device=load.device)
        expert_N = each.repeat_interleave(load, output_size=routing.slot_TK.numel())
        token_N = routing.choice_EC.div(choices, rounding_mode="floor")
        return Order(token_N, routing.slot_TK, expert_N[routing.slot_TK], Groups(expert_N, ends, sizes))


@mixtures.register("dropless")
class Dropless(RowExperts):
    """Makes :class:`LocalExperts` if all experts are in one process, otherwise :class:`RowExperts`."""

    @classmethod
    def make(cls, spec: ExpertsSpec, topology: Topology) -> Experts:
        return (LocalExperts if cls.alone(topology.degrees) else RowExperts)(spec, topology)

    @classmethod
    def alone(cls, degrees: ParallelDegrees) -> bool:
        return degrees.tensor == degrees.expert == 1


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
    ) -> Tensor:
        z, y_NH = computing.forward(x_TH, up, up_bias, down, order)
        ctx.save_for_backward(x_TH, gate_TK, up, up_bias, down, down_bias, z)
        ctx.order, ctx.computing = order, computing
        return computing.rows.combine(y_NH, order.place_TK, gate_TK, down_bias, order.expert_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_TK, up, up_bias, down, down_bias, z = ctx.saved_tensors
        order, computing, grad_TH = ctx.order, ctx.computing, grads[0].contiguous()
        gate_N = torch.empty_like(gate_TK).flatten().scatter_(0, order.place_TK.flatten(), gate_TK.flatten())
        grad_NH, grad_z, grad_gate_N, grad_up, grad_down = computing.backward(
            grad_TH, x, z, up, up_bias, down, gate_N, order, (ctx.needs_input_grad[2], ctx.needs_input_grad[4])
        )
        grad_x = computing.rows.combine(grad_NH, order.place_TK, None, None, order.expert_TK)
        grad_gate = grad_gate_N[order.place_TK]
        grad_up_bias = grad_down_bias = None
        if up_bias is not None:
            grad_up_bias = sums_by_expert(grad_z, order.groups.expert_N, len(up))
        if down_bias is not None:
            each = torch.arange(len(up), device=x.device)
            # The gates of each token by expert: the bias is added gate times.
            gate_TE = (order.expert_TK.unsqueeze(-1) == each) * gate_TK.unsqueeze(-1)
            grad_down_bias = gate_TE.sum(1).to(grad_TH.dtype).mT @ grad_TH
            products_TE = (grad_TH @ down_bias.mT).to(gate_TK.dtype)
            grad_gate = grad_gate + products_TE.gather(1, order.expert_TK)
        return grad_x, grad_gate, grad_up, grad_up_bias, grad_down, grad_down_bias, None, None
