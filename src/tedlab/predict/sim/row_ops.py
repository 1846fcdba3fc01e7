"""The kernels on rows of local experts, as a GPU runs them, for a simulation: a kernel's inside shows no operations."""

from collections.abc import Callable

import torch
from torch import Tensor

from tedlab.nn import Nonlinearity


class FusedRowOps:
    """Takes the place of ``tedlab.moe.row_kernels``: makes the results, and tells what a kernel moves.

    Args:
        count: Told the tensors that a kernel reads or writes once.
    """

    def __init__(self, count: Callable[..., None]) -> None:
        self.count = count

    def take(self, x_TH: Tensor, token_N: Tensor) -> Tensor:
        """See :func:`tedlab.moe.row_ops.take`."""
        out = x_TH.new_empty(len(token_N), x_TH.shape[1])
        self.count(out, out, token_N)
        return out

    def hidden(self, z_NZ: Tensor, bias_eZ: Tensor | None, expert_N: Tensor, how: Nonlinearity) -> Tensor:
        """See :func:`tedlab.moe.row_ops.hidden`."""
        out = z_NZ.new_empty(len(z_NZ), z_NZ.shape[1] // (2 if how.gated else 1))
        self.count(z_NZ, out)
        return out

    def hidden_backward(
        self,
        grad_NF: Tensor,
        z_NZ: Tensor,
        bias_eZ: Tensor | None,
        expert_N: Tensor,
        weight_N: Tensor,
        how: Nonlinearity,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`tedlab.moe.row_ops.hidden_backward`."""
        results = torch.empty_like(z_NZ), torch.empty_like(grad_NF), torch.empty_like(weight_N)
        self.count(grad_NF, z_NZ, weight_N, *results)
        return results

    def combine(
        self, y_NH: Tensor, place_TK: Tensor, gate_TK: Tensor | None, bias_eH: Tensor | None, expert_TK: Tensor
    ) -> Tensor:
        """See :func:`tedlab.moe.row_ops.combine`."""
        out = y_NH.new_empty(len(place_TK), y_NH.shape[1])
        self.count(y_NH, out, place_TK)
        return out
