"""What experts without a capacity compute where all of them are in one process, forward and backward.

Matrix products are torch's ``grouped_mm``, or one by one (see ``grouped.py``); ``moe.kernel`` chooses what gathers,
activates and weights the rows around them: ``torch`` (``rows.py``) or ``triton`` (``row_kernels.py``). Legend as there.
"""

import functools
import importlib.util
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from tedlab.moe import rows
from tedlab.moe.grouped import Groups, times, transposed_times


class Order(NamedTuple):
    """The rows of a micro-batch.

    Attributes:
        token_N: which token each row is.
        place_TK: where the rows of each token are.
        expert_TK: whose they are.
        groups: whose the rows are.
    """

    token_N: Tensor
    place_TK: Tensor
    expert_TK: Tensor
    groups: Groups


class Products:
    """Forward and backward pass of all experts.

    Args:
        rows: the module whose functions are applied to rows: ``rows`` or ``row_kernels``.
        gated: SwiGLU experts; otherwise GELU.
    """

    def __init__(self, rows: ModuleType, gated: bool) -> None:
        self.rows, self.gated = rows, gated

    def forward(
        self, x_TH: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, order: Order
    ) -> tuple[Tensor, Tensor]:
        """What :meth:`backward` wants to see again (N, Z), and each row's result (N, H) without the second bias.

        Args:
            x_TH: tokens.
            up: (e, H, Z).
            up_bias: (e, Z).
            down: (e, F, H).
            order: of the rows.
        """
        z_NZ = times(self.rows.take(x_TH, order.token_N), up, order.groups)
        h_NF = self.rows.hidden(z_NZ, up_bias, order.groups.expert_N, self.gated)
        return z_NZ, times(h_NF, down, order.groups)

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
        """Backward of the gate-weighted sum of the results of each token's rows.

        Neither the results nor the activations are needed: the gradient of a row's gate is the product of its
        activations with their gradient (Guo et al. 2025, SonicMoE, §3).

        Args:
            grad_TH: of the sum.
            x_TH, up, up_bias, down, order: see :meth:`forward`.
            z_NZ: from there.
            gate_N: weight of each row.

        Returns:
            Gradients: of each row's input (N, H), of z (N, Z), of the gates (N,), of ``up`` and of ``down``.
        """
        groups = order.groups
        grad_NH = self.rows.take(grad_TH, order.token_N)
        grad_z, weighted, grad_gate = self.rows.hidden_backward(
            times(grad_NH, down.mT, groups), z_NZ, up_bias, groups.expert_N, gate_N, self.gated
        )
        grad_down = transposed_times(weighted, grad_NH, groups)
        del grad_NH, weighted
        grad_up = transposed_times(self.rows.take(x_TH, order.token_N), grad_z, groups)
        return times(grad_z, up.mT, groups), grad_z, grad_gate, grad_up, grad_down


def products(kernel: str, gated: bool, x: Tensor) -> Products:
    """With the row operations asked for, or with ``auto`` the fastest that take these rows.

    Args:
        kernel: auto, torch or triton.
        gated: see :class:`Products`.
        x: like the tokens, in dtype and device.

    Warns:
        UserWarning: once, if the kernel asked for does not take them, with the reason.
    """
    if kernel == "torch":
        return Products(rows, gated)
    reason = unfit(x.dtype, x.device)
    if reason is None:
        from tedlab.moe import row_kernels

        return Products(row_kernels, gated)
    if kernel == "triton":
        _warn_once(f"moe.kernel=triton is not used here: {reason}")
    return Products(rows, gated)


def unfit(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why Triton kernels do not take rows; None if they do."""
    if device.type != "cuda":
        return f"it needs a CUDA GPU, these are on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it computes in fp32, these are {dtype}"
    if not _installed("triton"):
        return "Triton is not installed: pip install triton"
    return None


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
