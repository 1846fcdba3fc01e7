"""Which tokens a process works on, so that what is drawn or recorded for a token does not depend on the layout."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tedlab.comm.reading import deliver

if TYPE_CHECKING:
    from tedlab.moe.recording import Replay, RoutingRecorder
    from tedlab.nn.documents import SampleDocuments

_LOW = 0xFFFFFFFF  # the low 32 bits


class BatchContext:
    """The place of the current micro-batch in the run, the same in every layout that deals samples alike.

    A micro-batch is known by its step and by its number among those of the step: data rank d of D works on the numbers
    d, d + D, d + 2·D, … A strategy says where the run is (:meth:`at`); alone, a layer is at step 0, micro-batch 0.

    Args:
        device: The device that numbers are drawn on.

    Attributes:
        seed: The seed of the run's draws.
        step: The number of optimizer steps taken.
        micro_batch: The number of the micro-batch within the step.
        ids: The token ids (B, S) of the micro-batch, which a model sets for routers that read them.
        documents: Which of its tokens see each other, which a model sets for attention; None: all.
        recorder: Where routers record their choices in training; None: nowhere.
        reporting: Whether anybody reads what routers report of a micro-batch; see :meth:`unreported`.
        replay: The record whose choices routers make in training, in place of their own; None: none.
    """

    def __init__(self, device: torch.device) -> None:
        self.seed = 0
        self.step = self.micro_batch = 0
        self.ids: Tensor | None = None
        self.documents: SampleDocuments | None = None
        self.recorder: RoutingRecorder | None = None
        self.replay: Replay | None = None
        self.reporting = True
        # On the device, so that a compiled region reads numbers that change without being compiled again.
        self._place = torch.zeros(2, dtype=torch.int64, device=device)

    def at(self, step: int, micro_batch: int) -> None:
        """Moves to a micro-batch of a step."""
        self.step, self.micro_batch = step, micro_batch
        (self._place,) = deliver([np.array([step, micro_batch])], self._place.device)

    def keep(self) -> Callable[[], None]:
        """Notes the current micro-batch and torch's generators, and returns a function that moves back to them.

        A module's own dropout draws from these generators, and recomputation sets them back for a while.
        """
        step, micro_batch, ids, place = self.step, self.micro_batch, self.ids, self._place
        documents = self.documents
        device, cpu = place.device, torch.get_rng_state()
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

        def restore() -> None:
            self.step, self.micro_batch, self.ids, self._place = step, micro_batch, ids, place
            self.documents = documents
            torch.set_rng_state(cpu)
            if gpu is not None:
                torch.cuda.set_rng_state(gpu, device)

        return restore

    @contextmanager
    def unreported(self) -> Iterator[None]:
        """Spares routers the losses of their reports inside the context, where nobody reads them."""
        before, self.reporting = self.reporting, False
        try:
            yield
        finally:
            self.reporting = before

    def tokens(self, samples: int, length: int, shard: int = 0, shards: int = 1) -> Tensor:
        """Returns the numbers of a micro-batch's tokens within the step's global batch, sample after sample.

        Args:
            samples: The number of samples in the micro-batch.
            length: The number of positions of a sample that this process holds.
            shard: Which part of the positions it holds, of ``shards``.
            shards: The number of processes that divide the positions.

        Returns:
            (samples · length,) int64.
        """
        device = self._place.device
        sample = self._place[1] * samples + torch.arange(samples, device=device)
        position = shard * length + torch.arange(length, device=device)
        return (sample.unsqueeze(1) * (shards * length) + position).flatten()

    def uniform(self, stream: int, row_T: Tensor, columns: int, stepwise: bool = True) -> Tensor:
        """Draws numbers between 0 and 1 that depend on the seed, the step, the stream, the row and the column alone.

        They come from a hash of these, not from a generator with a state: whoever draws again, as recomputation does,
        draws the same.

        Args:
            stream: Which of the step's draws this is.
            row_T: (T,) int64, what each row is drawn for.
            columns: The numbers to draw for each row, N.
            stepwise: Whether to draw others in each step.

        Returns:
            (T, N) float64, neither 0 nor 1.
        """
        hashed = _mixed(torch.full_like(row_T, self.seed & _LOW), self.seed >> 32)
        hashed = _mixed(hashed, self._place[0] + 1 if stepwise else 0)
        hashed = _mixed(_mixed(hashed, stream), row_T)
        column = torch.arange(columns, device=row_T.device)
        # Of this dtype by its name: the default one may be another when the backward pass computes again.
        return (_mixed(hashed.unsqueeze(1), column).double() + 0.5) / (_LOW + 1)


def _mixed(state: Tensor, number: Tensor | int) -> Tensor:
    """Mixes a number into 32 bits of state, with Wellons' hash function lowbias32; products wrap around."""
    low = (number & _LOW) ^ ((number >> 32) & _LOW)
    x = (state * 0x9E3779B1 + low + 1) & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)
