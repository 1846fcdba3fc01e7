"""Exchanges the weights of lent experts, and in backward their gradients, which reach home before they are accumulated.

To the home, what borrowers return is a part of the gradient like that of its own rows: buckets, clipping, optimizer and
checkpoints do not know of loans, and optimizer states never move.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tedlab.comm import Collectives, Phase, Splits, to_compute_dtype
from tedlab.comm.keep import WEIGHTS as TAG
from tedlab.comm.recompute import collective
from tedlab.moe.lending.plan import Plan


@dataclass(frozen=True)
class Loans:
    """What one process lends and borrows.

    Attributes:
        lent: Its experts that it lends, by their index in this process, in order of borrower and then of expert; one
            that several borrow is there several times.
        splits: How many it lends to each process, and borrows from each.
    """

    lent: tuple[int, ...]
    splits: Splits

    @property
    def borrowed(self) -> int:
        """The number of experts that it borrows."""
        return sum(self.splits.received)


def loans_of(plan: Plan, process: int) -> Loans | None:
    """Returns what a process lends and borrows; None if nobody does, in which case nothing is exchanged."""
    if not plan.loans:
        return None
    lent = sorted((loan.borrower, loan.expert) for loan in plan.loans if plan.home(loan.expert) == process)
    homes = [plan.home(loan.expert) for loan in plan.loans if loan.borrower == process]
    processes = range(plan.processes)
    splits = Splits(
        tuple(sum(borrower == other for borrower, _ in lent) for other in processes),
        tuple(homes.count(other) for other in processes),
    )
    first = process * (len(plan.load_E) // plan.processes)
    return Loans(tuple(expert - first for _, expert in lent), splits)


def lend(
    weights: Sequence[Tensor | None], loans: Loans, lent: Tensor, comm: Collectives
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Exchanges lent experts in one all-to-all of the expert group, which all of its processes enter.

    Each tensor rank lends its part. Weights travel as they are multiplied: in autocast's dtype where there is one.

    Args:
        weights: (e, …) each, the weights of this process's experts, or None for those that there are not.
        loans: What this process lends and borrows.
        lent: ``loans.lent`` on the device, int64.
        comm: The collectives of this process.

    Returns:
        The weights to use for this process's own experts, which collect the gradients of lent ones, too; and those of
        the borrowed experts, (borrowed, …) each, in the order of homes and experts.
    """
    there = [weight for weight in weights if weight is not None]
    *own, flat = _Lend.apply(comm, loans, lent, *there)
    widths = [weight[0].numel() for weight in there]
    parts = iter(part.unflatten(1, weight.shape[1:]) for part, weight in zip(flat.split(widths, 1), there, strict=True))
    passed = iter(own)
    return (
        tuple(None if weight is None else next(passed) for weight in weights),
        tuple(None if weight is None else next(parts) for weight in weights),
    )


class _Lend(Function):
    @staticmethod
    def forward(ctx: Any, comm: Collectives, loans: Loans, lent: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.comm, ctx.loans = comm, loans
        ctx.shapes = [weight.shape[1:] for weight in weights]
        widths = [shape.numel() for shape in ctx.shapes]
        width, like = sum(widths), to_compute_dtype(weights[0][:0])

        def launch(phase: Phase) -> Tensor:
            copies = like.new_empty(len(lent), width)
            for part, weight in zip(copies.split(widths, 1), weights, strict=True):
                part.copy_(weight.index_select(0, lent).flatten(1))
            return comm.all_to_all(copies, "expert", tag=TAG, phase=phase, splits=loans.splits)

        flat = collective(comm, TAG, launch, torch.Size((loans.borrowed, width)), like)
        ctx.save_for_backward(lent)
        return *(weight.view_as(weight) for weight in weights), flat

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *own, flat = grads
        (lent,) = ctx.saved_tensors
        back = ctx.loans.splits.reverse
        returned = ctx.comm.all_to_all(flat, "expert", tag=TAG, phase="backward", splits=back)
        parts = returned.split([shape.numel() for shape in ctx.shapes], 1)
        for grad, part, shape in zip(own, parts, ctx.shapes, strict=True):
            # Products have just made this gradient for nobody else; a copy would take as much memory as the weights.
            # A borrower has an expert once. Those of several are added in turn, since additions to one place at once
            # have no order on a GPU.
            for of, returned_part in zip(lent.split(back.received), part.split(back.received), strict=True):
                grad.index_add_(0, of, returned_part.unflatten(1, shape).to(grad.dtype))
        return None, None, None, *own
