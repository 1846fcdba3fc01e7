"""Products of groups of rows by quack-kernels, which gathers rows and computes activations within them.

An optional dependency (``pip install 'tedlab[quack]'``), for Hopper and later GPUs. The first call with new shapes
compiles kernels and tries their variants, which takes seconds to minutes; results are kept on disk.
"""

from typing import Any

import torch
from torch import Tensor

from tedlab.moe.products import Order, Products


class QuackProducts(Products):
    """See :class:`Products`."""

    def __init__(self, rows: Any, gated: bool) -> None:
        super().__init__(rows, gated)
        from quack import gemm_interface  # type: ignore[import-not-found, unused-ignore]

        self.quack, self.activation = gemm_interface, "swiglu" if gated else "gelu_erf"

    def forward(
        self, x_TH: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, order: Order
    ) -> tuple[Tensor, Tensor]:
        z, h = self.quack.gemm_act(
            x_TH, up, bias=up_bias, activation=self.activation, cu_seqlens_m=order.bounds, A_idx=order.token_N
        )
        return z, self._times(h, down, order)

    def backward(
        self,
        grad_TH: Tensor,
        x_TH: Tensor,
        z_NZ: Tensor,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        gate_N: Tensor,
        order: Order,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        # What forward kept has the bias in it.
        grad_z, weighted, grad_gate = self.quack.gemm_dact(
            grad_TH,
            down.mT,
            z_NZ,
            activation=self.activation,
            colvec_scale=gate_N.float(),
            colvec_reduce=True,
            cu_seqlens_m=order.bounds,
            A_idx=order.token_N,
        )
        grad_up = self._outer(x_TH, grad_z, torch.empty_like(up), order)
        grad_down = torch.empty_like(down)
        self._outer(grad_TH, weighted, grad_down.mT, order)
        return self._times(grad_z, up.mT, order), grad_z, grad_gate.to(gate_N.dtype), grad_up, grad_down

    def _times(self, x_NK: Tensor, weight_eKM: Tensor, order: Order) -> Tensor:
        return self.quack.gemm(x_NK, weight_eKM, cu_seqlens_m=order.bounds)

    def _outer(self, x_TK: Tensor, y_NM: Tensor, out_eKM: Tensor, order: Order) -> Tensor:
        """Per expert x[its tokens]ᵀ @ y: (e, K, M)."""
        return self.quack.gemm(x_TK.mT, y_NM, out=out_eKM, cu_seqlens_k=order.bounds, A_idx=order.token_N)
