"""Stops training before a loss or a gradient that is not finite reaches a weight."""

from collections.abc import Iterable
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from tedlab.comm import Collectives


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or a weight is infinite or not a number. All processes raise it alike."""


class FiniteGuard:
    """Collects the losses of an optimizer's current step, and reports what went wrong in it.

    Processes learn from the exchange of the gradient's norm whether anything is not finite, see
    :class:`ShardedOptimizer`. Only then do they ask what and where.

    Args:
        comm: The collectives of this process.
    """

    def __init__(self, comm: Collectives) -> None:
        self.comm = comm
        self._step = 0
        self._losses: list[tuple[int, Tensor]] = []  # (batch index, loss) of the current step

    def note(self, step: int, batch_idx: int, loss: Tensor) -> None:
        """Records a loss, which stays on its device.

        Args:
            step: Number of steps finished before.
            batch_idx: Index of the batch, as Lightning counts.
            loss: Scalar, without the loss scale.
        """
        self._step = step
        self._losses.append((batch_idx, loss.detach()))

    def wrong(self) -> Tensor | float:
        """Returns the number of this process's losses that are not finite, on the device if there are losses."""
        if not self._losses:
            return 0.0
        return torch.stack([loss.double() for _, loss in self._losses]).isfinite().logical_not().sum()

    def forget(self) -> None:
        """Drops the losses, because the step is over or their gradients were dropped."""
        self._losses.clear()

    def stop(self, parameters: Iterable[str], scaled: bool) -> NoReturn:
        """Raises :class:`NonFiniteError` with the same message in all processes. Collective.

        Args:
            parameters: Names of parameters in whose gradient this process has found parts that are not finite.
            scaled: Whether the smallest possible loss scale was tried.
        """
        losses = [(batch, loss.item()) for batch, loss in self._losses]
        own = ([(batch, loss) for batch, loss in losses if loss - loss != 0], list(parameters))
        everybody: list[tuple[list[tuple[int, float]], list[str]]] = [own] * self.comm.size("world")
        dist.all_gather_object(everybody, own, self.comm.group("world"))
        wrong = [(batch, rank, loss) for rank, (found, _) in enumerate(everybody) for batch, loss in found]
        if wrong:
            first, _, value = min(wrong)
            ranks = ", ".join(str(rank) for batch, rank, _ in wrong if batch == first)
            what = f"the loss is {value} in batch {first} on rank {ranks}"
        else:
            names = list(dict.fromkeys(name for _, found in everybody for name in found))
            more = f" and of {len(names) - 1} more" if names[1:] else ""
            batches = sorted({batch for batch, _ in losses})
            of = f" of batch {', '.join(map(str, batches))}" if batches else ""
            what = f"the gradient{of} is not finite, of {names[0] if names else 'a parameter'}{more}; all losses are"
        if scaled:
            what += ", with the smallest loss scale"
        raise NonFiniteError(
            f"Stopped in step {self._step + 1} before any weight changed: {what}. Checkpoints are of finite weights; "
            "resume from the last with a lower learning rate or other data. stop_on_nonfinite=False would train on"
        )


def check_saved(weights: Iterable[Tensor], comm: Collectives, step: int, device: torch.device) -> None:
    """Checks whether weights may be saved. Collective.

    Args:
        weights: This process's weights; there may be none.
        comm: The collectives of this process.
        step: Step after which they are saved, for the message.
        device: Device of the weights and of collectives.

    Raises:
        NonFiniteError: In all processes, if one has found a weight that is not finite.
    """
    bad = sum(
        (tensor.isfinite().all().logical_not().double() for tensor in weights),
        torch.zeros((), dtype=torch.double, device=device),
    )
    if comm.all_reduce(bad, "world", tag="checkpoint.finite", phase="checkpoint").item():
        raise NonFiniteError(
            f"Not saved: after step {step} there are weights that are not finite, though no gradient was; the last "
            "checkpoint is kept. A lower learning rate may help"
        )
