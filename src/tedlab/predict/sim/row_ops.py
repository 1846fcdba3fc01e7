"""The kernels on rows of experts, as a GPU runs them, for a simulation: a kernel's inside shows no operations."""

from collections.abc import Callable

import torch
from torch import Tensor

from tedlab.nn import Nonlinearity


class FusedRowOps:
    """Takes the place of ``tedlab.moe.row_kernels``: makes the results, and tells what a kernel moves.

    Args:
        count: Told the name of a kernel, and the tensors that a kernel reads or writes once.
        rows: How many rows there are, where there is room for more, which kernels skip; None: as many as there is room.
    """

    def __init__(self, count: Callable[..., None], rows: int | None = None) -> None:
        self.count, self.rows = count, rows

    def of(self, rows: int) -> "FusedRowOps":
        """Returns the kernels on so many rows."""
        return FusedRowOps(self.count, rows)

    def _there(self, *room: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor[: self.rows] for tensor in room)

    def take(self, x_TH: Tensor, token_N: Tensor, missing: bool = False) -> Tensor:
        """See :func:`tedlab.moe.row_ops.take`."""
        out = x_TH.new_empty(len(token_N), x_TH.shape[1])
        self.count("take", *self._there(out, out), token_N)
        return out

    def sums(self, y_RH: Tensor, place_TK: Tensor) -> Tensor:
        """See :func:`tedlab.moe.row_ops.sums`."""
        return self.combine(y_RH, place_TK, None, None, place_TK)

    def hidden(self, z_NZ: Tensor, bias_eZ: Tensor | None, expert_N: Tensor, how: Nonlinearity) -> Tensor:
        """See :func:`tedlab.moe.row_ops.hidden`."""
        out = z_NZ.new_empty(len(z_NZ), z_NZ.shape[1] // (2 if how.gated else 1))
        self.count("hidden", *self._there(z_NZ, out))
        return out

    def hidden_backward(
        self,
        grad_NF: Tensor,
        z_NZ: Tensor,
        bias_eZ: Tensor | None,
        expert_N: Tensor,
        weight_N: Tensor | None,
        how: Nonlinearity,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See :func:`tedlab.moe.row_ops.hidden_backward`."""
        grad_z = torch.empty_like(z_NZ)
        if weight_N is None:
            self.count("hidden_backward", *self._there(grad_NF, z_NZ, grad_z))
            return grad_z, None, None
        weighted, grad_weight = torch.empty_like(grad_NF), torch.empty_like(weight_N)
        touched = self._there(grad_NF, z_NZ, weight_N, grad_z, weighted, grad_weight)
        self.count("hidden_backward", *touched)
        return grad_z, weighted, grad_weight

    def combine(
        self, y_NH: Tensor, place_TK: Tensor, gate_TK: Tensor | None, bias_eH: Tensor | None, expert_TK: Tensor
    ) -> Tensor:
        """See :func:`tedlab.moe.row_ops.combine`."""
        out = y_NH.new_empty(len(place_TK), y_NH.shape[1])
        self.count("combine", *self._there(y_NH), out, place_TK)
        return out

    def combine_backward(
        self, grad_TH: Tensor, y_RH: Tensor, gate_TK: Tensor, choice_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :func:`tedlab.moe.row_ops.combine_backward`; the gradient of a token is read for each of its rows."""
        grad_y, grad_gate = torch.empty_like(y_RH), torch.zeros_like(gate_TK)
        self.count("combine_backward", y_RH, y_RH, grad_y, choice_R)
        return grad_y, grad_gate
