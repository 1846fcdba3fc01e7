"""What dropless experts compute where all of them are in one process, forward and backward, as a choice of kernels.

==========  ==============================================================  ========================================
kernel      matrix products                                                 rows around them
==========  ==============================================================  ========================================
torch       ``grouped_mm``, or one by one (see ``grouped.py``)              ``rows.py``
triton      the same                                                        ``row_kernels.py``
quack       quack-kernels: gather and activation are parts of a product     ``row_kernels.py``
==========  ==============================================================  ========================================

Legend as in ``rows.py``.
"""

import functools
import importlib.util
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tedlab.moe import rows
from tedlab.moe.grouped import Groups, native, times, transposed_times

KERNELS = ("auto", "torch", "triton", "quack")


class Order(NamedTuple):
    """The rows of a micro-batch.

    Attributes:
        token_N: which token each row is; int32.
        place_TK: where the rows of each token are.
        expert_TK: whose they are.
        groups: whose the rows are.
        bounds: (e + 1,) int32, where each expert's rows begin, and where all end.
    """

    token_N: Tensor
    place_TK: Tensor
    expert_TK: Tensor
    groups: Groups
    bounds: Tensor


class Products:
    """With torch's matrix products.

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


def products(kernel: str, gated: bool, x: Tensor, *widths: int) -> Products:
    """The kernels for these rows: those asked for, or with ``auto`` the fastest that take them.

    Args:
        kernel: one of :data:`KERNELS`.
        gated: see :class:`Products`.
        x: like the tokens, in dtype and device.
        widths: of tokens and activations.

    Warns:
        UserWarning: once, if the kernel asked for does not take them, with the reason and what is taken in its place.
    """
    if isinstance(x, FakeTensor):  # simulation sees operations, not what a kernel does inside
        return Products(rows, gated)
    why = {name: unfit(name, x.dtype, x.device, *widths) for name in ("quack", "triton")}
    names = ("quack", "triton") if kernel in ("auto", "quack") else (kernel,)
    chosen = next((name for name in names if name != "torch" and why[name] is None), "torch")
    if kernel not in ("auto", chosen):
        _warn_once(f"moe.kernel={kernel} does not do here ({why[kernel]}); moe.kernel={chosen} is used")
    if chosen == "torch":
        return Products(rows, gated)
    from tedlab.moe import row_kernels

    if chosen == "triton":
        return Products(row_kernels, gated)
    from tedlab.moe.quack import QuackProducts

    return QuackProducts(row_kernels, gated)


def unfit(kernel: str, dtype: torch.dtype, device: torch.device, *widths: int) -> str | None:
    """Why a kernel, ``triton`` or ``quack``, does not take such rows; None if it does."""
    if device.type != "cuda":
        return f"it needs a CUDA GPU, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it computes in fp32, less than {dtype}"
    if not _installed("triton"):
        return "Triton is not installed: pip install triton"
    if kernel == "triton":
        return None
    if not _installed("quack"):
        return "quack-kernels is not installed: pip install 'tedlab[quack]'"
    if not native(dtype, *widths):
        return f"it takes bfloat16 and widths that are multiples of 8, not {dtype} and {widths}"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"it needs a Hopper GPU or a later one, not {torch.cuda.get_device_name(device)}"
    return None


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
