"""Which samples a data rank reads, and in which order.

The order is a function of (seed, epoch, number of the micro-batch in the epoch) and never of the layout: one process
that accumulates D micro-batches sees exactly what D data ranks see. Building the ``DataLoader`` is ``module.py``'s job.
"""

from collections.abc import Iterator, Sized

import numpy as np
from torch.utils.data.distributed import DistributedSampler


class MicroBatchSampler(DistributedSampler[int]):
    """Deals the micro-batches of an epoch to the data ranks in turn: rank d of D takes d, d + D, d + 2·D, …

    Micro-batch n holds ``order[n·b : (n + 1)·b]``, where ``order`` is the permutation of (seed, epoch), or the
    identity. An epoch is a whole number of optimizer steps, so its length does not depend on the layout either; the
    samples left over are different ones in every epoch.

    A ``DistributedSampler`` only so that Lightning keeps it and calls ``set_epoch``.

    Args:
        dataset: What is sampled; only its length is read.
        num_replicas: Data ranks.
        rank: This data rank.
        batch_size: Samples of one optimizer step, over all data ranks and accumulated micro-batches.
        micro_batch_size: Samples of one forward pass of one data rank; give the ``DataLoader`` the same batch size.
        seed: Of the permutations; non-negative.
        shuffle: Whether to permute.

    Raises:
        ValueError: The dataset has fewer samples than one optimizer step takes, or the micro-batches of a step cannot
            be dealt evenly to the ranks.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        num_replicas: int,
        rank: int,
        batch_size: int,
        micro_batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        if batch_size % (micro_batch_size * num_replicas):
            raise ValueError(
                f"data.batch_size={batch_size} cannot be dealt evenly to {num_replicas} data ranks in micro-batches of "
                f"data.micro_batch_size={micro_batch_size}: it must be a multiple of "
                f"{num_replicas} x {micro_batch_size} = {num_replicas * micro_batch_size}."
            )
        if len(dataset) < batch_size:
            raise ValueError(
                f"The dataset has {len(dataset)} samples, fewer than one optimizer step takes "
                f"(data.batch_size={batch_size}). Use more text, a smaller batch or a shorter sequence_length."
            )
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.total_size = len(dataset) // batch_size * batch_size  # samples of one epoch over all ranks
        self.num_samples = self.total_size // num_replicas
        self._resumed_epoch, self._resumed_offset = 0, 0

    def start_at(self, samples: int) -> None:
        """Continue a run that has consumed ``samples`` samples so far, over all ranks and epochs.

        The epoch that holds the next sample starts there; every other epoch starts at its beginning. That epoch is
        also made the current one, because ``DataLoader`` workers fetch their first batches before Lightning calls
        ``set_epoch``.

        Raises:
            ValueError: ``samples`` is no whole number of optimizer steps.
        """
        if samples % self.batch_size:
            raise ValueError(
                f"Cannot continue after {samples} samples: that is no whole number of optimizer steps of "
                f"data.batch_size={self.batch_size}. Resume with the batch size that the run was started with."
            )
        self._resumed_epoch, self._resumed_offset = divmod(samples, self.total_size)
        self.epoch = self._resumed_epoch

    def __iter__(self) -> Iterator[int]:
        """Sample indices of this rank in this epoch, micro-batch by micro-batch."""
        count = len(self.dataset)  # type: ignore[arg-type]
        order = np.random.default_rng([self.seed, self.epoch]).permutation(count) if self.shuffle else np.arange(count)
        micro_batches = order[: self.total_size].reshape(-1, self.micro_batch_size)
        first = self._resumed_offset // self.micro_batch_size if self.epoch == self._resumed_epoch else 0
        for micro_batch in micro_batches[first + self.rank :: self.num_replicas]:
            yield from micro_batch.tolist()
