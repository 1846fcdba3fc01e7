"""Token paths: how tokens reach their experts and how results come back.

A token path has two methods, ``dispatch`` and ``combine``, and knows nothing of routers' and experts' weights.
Legend as in ``router.py``; in addition e: experts of this process (E / E_p), N = E_p·C: slots of one expert.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from tedlab.comm import Collectives, all_to_all
from tedlab.moe.router import Routing


class AllToAllDispatcher:
    """The paper's path without DTD: every tensor rank exchanges every token within its expert group.

    Tokens are moved by index, never by multiplication with a one-hot mask.

    Args:
        num_experts: E, a multiple of the expert degree.
        comm: the collectives of this process.
    """

    def __init__(self, num_experts: int, comm: Collectives) -> None:
        self.comm = comm
        self.ranks = comm.size("expert")
        self.local_experts = num_experts // self.ranks

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Tokens of this rank (T, H) → slots of this rank's experts (e, N, H); empty slots hold zeros."""
        token_EC = routing.choice_EC.div(routing.slot_TK.shape[1], rounding_mode="floor")  # -1 stays -1
        x = _GatherRows.apply(x_TH, token_EC, routing.slot_TK)  # (E·C, H), sorted by expert, hence by rank
        x = all_to_all(x, self.comm, "expert", "dispatch.all_to_all")
        x = x.unflatten(0, (self.ranks, self.local_experts, -1))  # (E_p senders, e, C, H)
        return x.transpose(0, 1).flatten(1, 2)

    def combine(self, y_eNH: Tensor, routing: Routing) -> Tensor:
        """Experts' results (e, N, H) → for each token of this rank the gate-weighted sum of its choices (T, H)."""
        y = y_eNH.unflatten(1, (self.ranks, -1)).transpose(0, 1).flatten(0, 2)  # (E_p receivers · e · C, H)
        y = all_to_all(y, self.comm, "expert", "combine.all_to_all")  # (E·C, H)
        y = _GatherRows.apply(y, routing.slot_TK.flatten(), routing.choice_EC.unsqueeze(1))
        y_TKH = y.unflatten(0, routing.slot_TK.shape)
        return (y_TKH * routing.gate_TK.to(y.dtype).unsqueeze(-1)).sum(1)


class _GatherRows(Function):
    """Rows by index, in both directions a gather: no atomics, so the same result every time.

    Forward: ``out[m] = x[index[m]]``, or zeros where ``index[m]`` is -1. ``inverse[n]`` lists every m with
    ``index[m] = n``, padded with -1, so backward is ``grad_x[n] = Σ_r grad_out[inverse[n, r]]``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _rows(x, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors  # (n, r)
        columns = [_rows(grads[0], column) for column in inverse.unbind(1)]
        return sum(columns[1:], start=columns[0]), None, None


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index.clamp(min=0)).masked_fill_((index < 0).unsqueeze(1), 0.0)
