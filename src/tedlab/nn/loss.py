"""Cross-entropy over logits whose vocabulary is divided over the tensor group. Logits are never gathered."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tedlab.comm import Collectives


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, comm: Collectives) -> Tensor:
    """Cross-entropy of every position.

    Forward all-reduces two vectors of N values over the tensor group (the maximum; then the sum of exponentials
    together with the target's logit). Backward needs no communication and works in place on the saved probabilities.

    Args:
        logits: (N, V/T), this rank's part of the vocabulary, in order of rank.
        targets: (N,) int64 global token ids, the same on every tensor rank.
        comm: the collectives of this process.

    Returns:
        (N,) losses in nats, in fp32 or better, the same on every tensor rank.
    """
    return _VocabParallelCrossEntropy.apply(logits, targets, comm)


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, comm: Collectives) -> Tensor:
        # A private copy in fp32 or better: it becomes the probabilities, and in backward the gradient.
        p_NV = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        largest_N = comm.all_reduce(p_NV.amax(-1), "tensor", tag="loss.max", phase="forward", op="max")
        p_NV.sub_(largest_N.unsqueeze(-1))

        column_N = targets - comm.rank("tensor") * p_NV.shape[-1]
        elsewhere_N = (column_N < 0) | (column_N >= p_NV.shape[-1])
        column_N = column_N.masked_fill(elsewhere_N, 0)
        target_N = p_NV.gather(-1, column_N.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere_N, 0.0)

        p_NV.exp_()
        totals = torch.stack((p_NV.sum(-1), target_N))  # (2, N)
        sum_N, target_N = comm.all_reduce(totals, "tensor", tag="loss.sum", phase="forward").unbind(0)
        p_NV.div_(sum_N.unsqueeze(-1))

        ctx.save_for_backward(p_NV, column_N, elsewhere_N)
        ctx.dtype = logits.dtype
        return sum_N.log() - target_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        p_NV, column_N, elsewhere_N = ctx.saved_tensors
        own_N = (~elsewhere_N).to(p_NV.dtype)
        p_NV.scatter_add_(-1, column_N.unsqueeze(-1), -own_N.unsqueeze(-1))  # softmax - one-hot
        return p_NV.mul_(grads[0].unsqueeze(-1)).to(ctx.dtype), None, None
