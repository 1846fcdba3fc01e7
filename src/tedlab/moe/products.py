"""What experts without a capacity compute if all are in one process, forward and backward.

Matrix products are torch's ``grouped_mm`` or run one by one (see ``grouped.py``). ``moe.kernel`` chooses what gathers,
activates and weights the rows around them: ``torch`` (``row_ops.py``) or ``triton`` (``row_kernels.py``). Legend as
there.
"""

import functools
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tedlab.moe import index_ops, row_ops
from tedlab.moe.grouped import Groups, times, transposed_times
from tedlab.nn import Nonlinearity


class Order(NamedTuple):
    """The order of a micro-batch's rows.

    Attributes:
        token_N: (N,) int64, the token of each row; -1 behind the last, where there may be room for more.
        choice_N: (N,) int64, the choice t·K + k of each row.
        place_TK: (T, K) int64, the rows of each token; -1: a choice that is not there, whose weight must be 0.
        expert_TK: (T, K) int64, the experts of each token; any where there is no choice.
        groups: Which expert each row belongs to.
    """

    token_N: Tensor
    choice_N: Tensor
    place_TK: Tensor
    expert_TK: Tensor
    groups: Groups


_stand_in: Any = None


@contextmanager
def standing_in(rows: Any) -> Iterator[None]:
    """Lets row operations take the place of the kernels inside the context, on any device and for any dtype.

    Args:
        rows: Has the functions of ``row_ops.py``, and ``of``, which returns those on so many rows where there is room
            for more.
    """
    global _stand_in
    before, _stand_in = _stand_in, rows
    try:
        yield
    finally:
        _stand_in = before


class Products:
    """Computes the forward and backward pass of all experts.

    Args:
        rows: The row operations, see :func:`row_functions`.
        how: The experts' activation.
    """

    def __init__(self, rows: Any, how: Nonlinearity) -> None:
        self.rows, self.how = rows, how

    def forward(
        self, x_TH: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, order: Order, whole: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Returns z (N, Z), which :meth:`backward` needs, and each row's result (N, H) without the second bias.

        If not ``whole``, it computes z alone, which it returns twice.

        Args:
            x_TH: Tokens.
            up: (e, H, Z), first projections.
            up_bias: (e, Z), their biases, if any.
            down: (e, F, H), second projections.
            order: Order of the rows.
            whole: Whether the results are wanted.
        """
        z_NZ = times(self.rows.take(x_TH, order.token_N), up, order.groups)
        if not whole:
            return z_NZ, z_NZ
        h_NF = self.rows.hidden(z_NZ, up_bias, order.groups.expert_N, self.how)
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
        wanted: tuple[bool, bool] = (True, True),
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Computes the backward pass of each token's gate-weighted sum of its rows' results.

        It needs neither the results nor the activations: the gradient of a row's gate is the product of its activations
        with their gradient (Guo et al. 2025, SonicMoE, §3).

        Args:
            grad_TH: Gradient of the sums.
            x_TH, up, up_bias, down, order: See :meth:`forward`.
            z_NZ: Returned by :meth:`forward`.
            gate_N: Weight of each row.
            wanted: Whether the gradients of ``up`` and of ``down`` are wanted, which those of frozen experts are not.

        Returns:
            Gradients of each row's input (N, H), of z (N, Z), of the gates (N,), of ``up`` and of ``down``, each of
            which is None if it is not wanted.
        """
        groups = order.groups
        grad_NH = self.rows.take(grad_TH, order.token_N)
        grad_z, weighted, grad_gate = self.rows.hidden_backward(
            times(grad_NH, down.mT, groups), z_NZ, up_bias, groups.expert_N, gate_N, self.how
        )
        of_up, of_down = wanted
        grad_down = transposed_times(weighted, grad_NH, groups) if of_down else None
        del grad_NH, weighted
        grad_up = transposed_times(self.rows.take(x_TH, order.token_N), grad_z, groups) if of_up else None
        return times(grad_z, up.mT, groups), grad_z, grad_gate, grad_up, grad_down


def products(kernel: str, how: Nonlinearity, x: Tensor, sizes: tuple[int, ...] | None = None) -> Products:
    """Returns what experts compute with the row operations that :func:`row_functions` chooses."""
    return Products(row_functions(kernel, x, sizes), how)


def row_functions(kernel: str, x: Tensor, sizes: tuple[int, ...] | None = None) -> Any:
    """Chooses the row operations that ``kernel`` names, or with ``auto`` the fastest that accept these rows.

    They are the functions of ``row_ops.py`` or ``row_kernels.py``, or what is :func:`standing_in` for the kernels.

    Args:
        kernel: ``auto``, ``torch`` or ``triton``.
        x: A tensor with the dtype and device of the rows.
        sizes: Number of rows of each expert, if the host knows it.

    Warns:
        UserWarning: Once, if ``kernel`` is ``triton``, which does not accept the rows; the message says why.
    """
    if kernel == "torch":
        return row_ops
    if _stand_in is not None:
        return _stand_in if sizes is None else _stand_in.of(sum(sizes))
    reason = unfit(x.dtype, x.device)
    if reason is None:
        from tedlab.moe import row_kernels

        return row_kernels
    if kernel == "triton":
        _warn_once(f"moe.kernel=triton is not used here: {reason}")
    return row_ops


def index_functions(kernel: str, device: torch.device) -> Any:
    """Chooses what makes lists of indices: functions of ``index_kernels.py`` on a GPU, of ``index_ops.py`` elsewhere.

    Args:
        kernel: See :func:`row_functions`. Both return the same numbers.
        device: Where they are.
    """
    if kernel == "torch" or unfit(torch.float32, device) is not None:
        return index_ops
    from tedlab.moe import index_kernels

    return index_kernels


def unfit(dtype: torch.dtype, device: torch.device) -> str | None:
    """Says why Triton kernels do not accept such rows; returns None if they do."""
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
