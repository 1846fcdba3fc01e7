"""Cross-entropy over logits whose vocabulary is divided over the tensor group. Logits are never gathered.

Means are over counted targets, which are those other than ``ignore_index``. If the micro-batches of a step or its data
ranks have different numbers of them, each micro-batch's mean still has the same weight, as it does in one process that
accumulates the same micro-batches; a token of a micro-batch with few counted targets then weighs more.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from tedlab.comm import Collectives, evaluating
from tedlab.nn.ids import check_ids
from tedlab.spec import Layout, MicroBatch, Site, Sites, Spec, Work

IGNORE_INDEX = -100  # torch's default


@dataclass(frozen=True)
class CrossEntropySpec(Spec):
    """Describes the functions below; its kernels are those of the logits of all tokens at once.

    Attributes:
        vocab_size: Global size of the vocabulary.
        chunk: How many tokens its collectives are for at a time; None: all.
    """

    vocab_size: int
    chunk: int | None = None

    def sites(self, layout: Layout) -> Sites:
        maximum = Site("loss.max", "all_reduce", "tensor", 1, dtype="precise", chunk=self.chunk)
        return Sites((maximum, replace(maximum, tag="loss.sum", width=2)))

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        logits = self.logits(b)
        yield b.moved(logits, b.compute, b.precise)
        for passes in (1, 2, 1):  # maximum, exp, sum
            yield b.moved(passes * logits, b.precise)
        for _ in ("difference", "quotient"):
            yield b.moved(2 * logits, b.precise, kernel="strided")

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        logits = self.logits(b)
        yield b.moved(2 * logits, b.precise, kernel="strided")
        if b.precise != b.compute:
            yield b.moved(logits, b.precise, b.compute)

    def saved(self, b: MicroBatch) -> int:
        return self.logits(b) * (b.compute.itemsize + b.precise.itemsize)

    def logits(self, b: MicroBatch) -> int:
        """Returns the number of logits that a process has."""
        return b.tokens * self.vocab_size // b.tensor


def mean_over_counted(losses: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Divides the sum of losses, which are 0 at ignored targets, by the number of counted targets; 0 if none counts."""
    return losses.sum() / _counted(targets != ignore_index)


def _counted(counts: Tensor) -> Tensor:
    return counts.sum().clamp(min=1)


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, comm: Collectives, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Computes the cross-entropy of every position.

    Forward all-reduces two vectors of N values over the tensor group (the maximum; then the sum of exponentials
    together with the target's logit). Backward needs no communication and works in place on the saved probabilities.

    Args:
        logits: (N, V/T), this rank's part of the vocabulary, in order of rank.
        targets: (N,) int64 global token ids, the same on every tensor rank.
        comm: The collectives of this process.
        ignore_index: The target of positions whose loss and gradient are 0.

    Returns:
        (N,) losses in nats, in fp32 or better, the same on every tensor rank; see :func:`mean_over_counted`.

    Raises:
        IndexError: If a target is outside the vocabulary, on a CPU; on a GPU the device asserts.
    """
    check_ids(targets, comm.size("tensor") * logits.shape[-1], "a target", ignore_index)
    return _VocabParallelCrossEntropy.apply(logits, targets, comm, ignore_index)


@torch.no_grad()
def vocab_parallel_argmax(logits: Tensor, comm: Collectives, known: int | None = None) -> Tensor:
    """Returns the most probable token of every position, the first of equals.

    Two vectors of N values are all-reduced over the tensor group.

    Args:
        logits: (N, V/T), this rank's part of the vocabulary, in order of rank.
        comm: The collectives of this process.
        known: Only ids below are considered; None: all.

    Returns:
        (N,) int64 global token ids, the same on every tensor rank.
    """
    columns = logits.shape[-1]
    start = comm.rank("tensor") * columns
    if known is not None and known < start + columns:
        logits = logits.masked_fill(torch.arange(start, start + columns, device=logits.device) >= known, -math.inf)
    own_N, column_N = logits.max(-1)
    largest_N = comm.all_reduce(own_N, "tensor", tag="argmax.max", phase="validation", op="max")
    nowhere = comm.size("tensor") * columns
    id_N = (column_N + start).masked_fill(own_N < largest_N, nowhere)
    return comm.all_reduce(id_N, "tensor", tag="argmax.first", phase="validation", op="min")


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, comm: Collectives, ignore_index: int) -> Tensor:
        # This private copy in fp32 or better becomes the probabilities, and in backward the gradient.
        p_NV = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        largest_N = comm.all_reduce(p_NV.amax(-1), "tensor", tag="loss.max", phase="forward", op="max")
        p_NV.sub_(largest_N.unsqueeze(-1))

        ignored_N = targets == ignore_index
        column_N = targets - comm.rank("tensor") * p_NV.shape[-1]
        elsewhere_N = (column_N < 0) | (column_N >= p_NV.shape[-1]) | ignored_N
        column_N = column_N.masked_fill(elsewhere_N, 0)
        target_N = p_NV.gather(-1, column_N.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere_N, 0.0)

        p_NV.exp_()
        totals = torch.stack((p_NV.sum(-1), target_N))  # (2, N)
        sum_N, target_N = comm.all_reduce(totals, "tensor", tag="loss.sum", phase="forward").unbind(0)
        p_NV.div_(_infinite(sum_N, ignored_N).unsqueeze(-1))

        ctx.save_for_backward(p_NV, column_N, elsewhere_N)
        ctx.dtype = logits.dtype
        return (sum_N.log() - target_N).masked_fill(ignored_N, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        p_NV, column_N, elsewhere_N = ctx.saved_tensors
        own_N = (~elsewhere_N).to(p_NV.dtype)
        p_NV.scatter_add_(-1, column_N.unsqueeze(-1), -own_N.unsqueeze(-1))  # softmax - one-hot
        return p_NV.mul_(grads[0].unsqueeze(-1)).to(ctx.dtype), None, None, None


def _infinite(sum_N: Tensor, ignored_N: Tensor) -> Tensor:
    """Sets the sums of ignored positions to infinity, which makes their probabilities 0 without another pass."""
    return sum_N.masked_fill(ignored_N, math.inf)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    comm: Collectives,
    chunk: int,
    backend: str = "none",
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Computes the mean cross-entropy of the logits ``x @ weightᵀ``, of which at most ``chunk`` rows exist at a time.

    If gradients are wanted, each chunk's logits become their own gradient at once, in place, and are multiplied into
    the gradients of ``x`` and ``weight``; nothing of the size of the logits is kept for backward. Forward all-reduces
    two vectors per chunk, in sum as many values as :func:`vocab_parallel_cross_entropy`.

    Args:
        x: (N, H) activations in the dtype to compute in, the same on every tensor rank.
        weight: (V/T, H), this rank's part of the vocabulary, in order of rank; cast to the dtype of ``x``.
        targets: (N,) int64 global token ids, the same on every tensor rank.
        comm: The collectives of this process.
        chunk: Number of rows of logits at a time.
        backend: Backend of ``torch.compile`` for the operations on a chunk's logits; ``none``: they run eagerly.
        ignore_index: The target of rows that do not count.

    Returns:
        The mean loss in nats of the rows that count (0 if none does), in fp32 or better, the same on every tensor rank.

    Raises:
        IndexError: If a target is outside the vocabulary, on a CPU; on a GPU the device asserts.
    """
    check_ids(targets, comm.size("tensor") * len(weight), "a target", ignore_index)
    return _LinearCrossEntropy.apply(x, weight, targets, comm, chunk, _softmax(backend), not evaluating(), ignore_index)


class _Softmax(NamedTuple):
    """The operations on the logits of any part of the vocabulary."""

    statistics: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    to_probabilities: Callable[[Tensor, Tensor, Tensor], None]


_stand_in: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None


@contextmanager
def compiling_loss(with_: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Lets ``with_`` take the place of the compiler of operations on logits: it gets a function."""
    global _stand_in
    _stand_in = with_
    try:
        yield
    finally:
        _stand_in = None


def _softmax(backend: str) -> _Softmax:
    if backend != "none" and _stand_in is not None:
        return _Softmax(_stand_in(_statistics), _stand_in(_to_probabilities))
    return _compiled(backend)


@functools.cache
def _compiled(backend: str) -> _Softmax:
    parts = _statistics, _to_probabilities
    return _Softmax(*parts if backend == "none" else (torch.compile(f, backend=backend, fullgraph=True) for f in parts))


def _statistics(logits_CV: Tensor, column_C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each row's maximum, its sum of exp(logit - maximum), and its logit in the given column."""
    precise_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    largest_C1 = precise_CV.amax(-1, keepdim=True)
    sum_C1 = (precise_CV - largest_C1).exp().sum(-1, keepdim=True)  # inductor recognises a softmax and reads once
    return largest_C1.squeeze(-1), sum_C1.squeeze(-1), precise_CV.gather(-1, column_C1).squeeze(-1)


def _to_probabilities(logits_CV: Tensor, largest_C: Tensor, sum_C: Tensor) -> None:
    """Replaces logits by probabilities in place, computed in fp32 or better and rounded once."""
    logits_CV.copy_((logits_CV - largest_C.unsqueeze(-1)).exp() / sum_C.unsqueeze(-1))


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        comm: Collectives,
        chunk: int,
        softmax: _Softmax,
        training: bool,
        ignore_index: int,
    ) -> Tensor:
        cast_VH = weight_VH.to(x_NH.dtype)
        precise = torch.promote_types(x_NH.dtype, torch.float32)
        loss = torch.zeros((), dtype=precise, device=x_NH.device)
        of_x_NH = torch.empty_like(x_NH) if training else x_NH
        wanted = training and ctx.needs_input_grad[1]  # not of a frozen weight
        of_weight_VH = torch.zeros_like(weight_VH, dtype=precise) if wanted else None
        start = comm.rank("tensor") * len(weight_VH)
        ignored_N = targets_N == ignore_index
        rows = x_NH, targets_N, ignored_N, of_x_NH
        for x_CH, targets_C, ignored_C, of_x_CH in zip(*(t.split(chunk) for t in rows), strict=True):
            logits_CV = x_CH @ cast_VH.mT
            column_C = targets_C - start
            elsewhere_C = (column_C < 0) | (column_C >= len(weight_VH)) | ignored_C
            column_C1 = column_C.masked_fill(elsewhere_C, 0).unsqueeze(-1)

            own_C, sum_C, found_C = softmax.statistics(logits_CV, column_C1)
            largest_C = comm.all_reduce(own_C, "tensor", tag="loss.max", phase="forward", op="max")
            found_C -= largest_C
            totals = torch.stack((sum_C * (own_C - largest_C).exp(), found_C.masked_fill(elsewhere_C, 0.0)))  # (2, C)
            sum_C, target_C = comm.all_reduce(totals, "tensor", tag="loss.sum", phase="forward").unbind(0)
            loss += (sum_C.log() - target_C).masked_fill(ignored_C, 0.0).sum()

            if training:
                sum_C = _infinite(sum_C, ignored_C)
                softmax.to_probabilities(logits_CV, largest_C, sum_C)
                # softmax - one-hot, subtracted before rounding
                at_column_C = found_C.exp() / sum_C - (~elsewhere_C).to(precise)
                logits_CV.scatter_(-1, column_C1, at_column_C.to(logits_CV.dtype).unsqueeze(-1))
                torch.mm(logits_CV, cast_VH, out=of_x_CH)
                if of_weight_VH is not None:
                    of_weight_VH += logits_CV.mT @ x_CH
        counted = _counted(~ignored_N)
        ctx.save_for_backward(of_x_NH, of_weight_VH, counted)
        ctx.dtype = weight_VH.dtype
        return loss / counted

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_x_NH, of_weight_VH, counted = ctx.saved_tensors
        scale = grads[0] / counted
        of_weight_VH = None if of_weight_VH is None else (of_weight_VH * scale).to(ctx.dtype)
        return of_x_NH * scale, of_weight_VH, None, None, None, None, None, None
