"""Decides which samples a data rank reads, and in which order.

The order depends on (seed, epoch, index of the micro-batch in the epoch) and never on the layout: one process that
accumulates D micro-batches sees exactly what D data ranks see. ``module.py`` builds the ``DataLoader``.
"""

from collections.abc import Iterator, Sized

import numpy as np
from torch.utils.data.distributed import DistributedSampler

from tedlab.data.position import Position
from tedlab.data.ramp import Ramp, Stage


class MicroBatchSampler(DistributedSampler[int]):
    """Deals the micro-batches of an epoch to the data ranks in turn: rank d of D takes d, d + D, d + 2·D, …

    Micro-batch n holds ``order[n·b : (n + 1)·b]``, where ``order`` is the permutation of (seed, epoch), or the
    identity. An epoch is a whole number of optimizer steps, so its length does not depend on the layout either; the
    samples left over are different ones in every epoch.

    This class is a ``DistributedSampler`` only so that Lightning keeps it and calls ``set_epoch``.

    Args:
        dataset: The samples; only its length is read.
        num_replicas: Number of data ranks.
        rank: Index of this data rank.
        batch_size: Samples per optimizer step, over all data ranks and accumulated micro-batches; a :class:`Ramp` if
            steps take different numbers.
        micro_batch_size: Samples per forward pass of one data rank; give the ``DataLoader`` the same batch size.
        seed: Seed of the permutations; non-negative.
        shuffle: Whether to permute.

    Raises:
        ValueError: If the dataset has fewer samples than one optimizer step takes, or the micro-batches of a step
            cannot be dealt evenly to the ranks.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        num_replicas: int,
        rank: int,
        batch_size: int | Ramp,
        micro_batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.ramp = batch_size if isinstance(batch_size, Ramp) else Ramp([Stage(None, batch_size, 0)])
        together = micro_batch_size * num_replicas
        for size in {stage.batch_size for stage in self.ramp.stages}:
            if size % together:
                raise ValueError(
                    f"data.batch_size={size} cannot be dealt evenly to {num_replicas} data ranks in micro-batches of "
                    f"data.micro_batch_size={micro_batch_size}: it must be a multiple of "
                    f"{num_replicas} x {micro_batch_size} = {together}."
                )
            if len(dataset) < size:
                raise ValueError(
                    f"The dataset has {len(dataset)} samples, fewer than one optimizer step takes "
                    f"(data.batch_size={size}). Use more text, a smaller batch or a shorter sequence_length."
                )
        self.micro_batch_size = micro_batch_size
        # Samples per epoch over all ranks. If steps take different numbers, no epoch has more.
        whole = self.ramp.stages[0].batch_size if len(self.ramp.stages) == 1 else together
        self.total_size = len(dataset) // whole * whole
        self.num_samples = self.total_size // num_replicas
        self._start, self._step = Position(), 0

    def start_at(self, start: Position, step: int = 0) -> None:
        """Continues a run from ``start``, whatever its batch size and layout were.

        The epoch of ``start`` begins there; every other epoch begins with its first sample. That epoch also becomes
        the current one, because ``DataLoader`` workers fetch their first batches before Lightning calls ``set_epoch``.
        The sampler's length stays that of a whole epoch.

        Args:
            start: A position with at least one step left in its epoch.
            step: The step that begins there.
        """
        self._start, self._step = start, step
        self.epoch = start.epoch

    def __iter__(self) -> Iterator[int]:
        """Yields this rank's sample indices of the current epoch, micro-batch by micro-batch."""
        count = len(self.dataset)  # type: ignore[arg-type]
        order = np.random.default_rng([self.seed, self.epoch]).permutation(count) if self.shuffle else np.arange(count)
        start, first = self._start, self._step
        for epoch in range(start.epoch, self.epoch):
            first, start = self.ramp.epoch_ends(start, first, count), Position(epoch + 1)
        end = self.ramp.after(start, first, self.ramp.epoch_ends(start, first, count), count).offset
        micro_batches = order[start.offset : end].reshape(-1, self.micro_batch_size)
        for micro_batch in micro_batches[self.rank :: self.num_replicas]:
            yield from micro_batch.tolist()
