"""Balance: losses that make routers use all experts, and biases that do so without a loss.

Legend as in ``router.py``, and L: MoE layers, G: groups of tokens whose load counts together.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tedlab.comm import Collectives
from tedlab.config import BiasUpdate
from tedlab.degrees import GroupKind


def balance_loss(counted_GE: Tensor, probs_GE: Tensor) -> Tensor:
    """Returns E·Σ f_e·P_e of each group (G,), which is 1 if both are even (Switch Transformer, eq. 4).

    Args:
        counted_GE: f, the share of the counted choices that fell on each expert.
        probs_GE: P, the mean probability of each expert.
    """
    return probs_GE.shape[-1] * (counted_GE * probs_GE).sum(-1)


class Sums(NamedTuple):
    """What the losses of a micro-batch are made of, over all its tokens. Several layers are stacked: (L, E) and (L,).

    Attributes:
        counted_E: Counted choices of each expert, as shares of a token's choices.
        probs_E: Probabilities of each expert; differentiable.
        z: Squared logsumexps of the logits; scalar, differentiable.
        tokens: Number of tokens; scalar.
    """

    counted_E: Tensor
    probs_E: Tensor
    z: Tensor
    tokens: Tensor

    @property
    def counts(self) -> Tensor:
        """What is counted, without a gradient: (L, E + 1) float64, counted choices by expert and tokens."""
        return torch.cat((self.counted_E, self.tokens.unsqueeze(-1)), -1).detach().double()


def step_totals(counts_LE: Tensor, comm: Collectives) -> Tensor:
    """Adds up the counts of a step over data ranks, for :func:`global_losses`.

    Args:
        counts_LE: ``Sums.counts``, summed over this data rank's micro-batches.
        comm: The collectives of the process.
    """
    return comm.all_reduce(counts_LE, "data", tag="router.totals", phase="forward")


def global_losses(sums: Sums, totals_LE: Tensor, micro_batches: int) -> tuple[Tensor, Tensor]:
    """Returns a micro-batch's parts of the losses over the global batch, by layer: (L,) and (L,).

    The mean of the parts over all micro-batches of a step, which is what training accumulates, is E·Σ f_e·P_e and the
    mean of logsumexp(logits)², with f_e, P_e and the mean over all tokens of the step. f_e has no gradient, so the
    gradients are those of one process that computes the whole batch at once.

    Args:
        sums: Those of this micro-batch, by layer.
        totals_LE: What :func:`step_totals` returns for the step.
        micro_batches: Number of micro-batches in the step, over all data ranks.
    """
    totals_LE = totals_LE.to(sums.probs_E.dtype)
    counted_LE, tokens_L = totals_LE[:, :-1], totals_LE[:, -1].clamp(min=1)
    each_L = micro_batches / tokens_L
    balance_L = balance_loss(counted_LE / tokens_L.unsqueeze(1), sums.probs_E * each_L.unsqueeze(1))
    return balance_L, sums.z * each_L


class Biased(Protocol):
    """A router whose choices are balanced by biases."""

    sharded: bool

    def take_load(self) -> Tensor:
        """Returns the load (E,) int64 of the micro-batches since the last call."""
        ...

    def adjust(self, load_E: Tensor) -> None:
        """Moves the biases, given the load of the step over all processes."""
        ...


def update_biases(routers: Sequence[Biased], comm: Collectives) -> None:
    """Adds up the step's load over processes, in one collective for all routers, and moves their biases."""
    loads = [router.take_load() for router in routers]
    kind: GroupKind = "world" if routers[0].sharded else "data"
    total = comm.all_reduce(torch.cat(loads), kind, tag="router.bias", phase="optimizer")
    for router, load_E in zip(routers, total.split([len(load) for load in loads]), strict=True):
        router.adjust(load_E)


def bias_step(load_E: Tensor, update: str, rate: float) -> Tensor:
    """Returns what the biases of a step's load change by (DeepSeek-V3, §2.1.2): (E,) float64."""
    load_E = load_E.double()
    lack_E = 1 - load_E / load_E.mean().clamp(min=1)
    return rate * (lack_E.sign() if update == BiasUpdate.SIGN else lack_E)
