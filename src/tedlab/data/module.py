"""The Lightning data module: its loaders read the same samples in the same order under every layout."""

from dataclasses import asdict
from typing import Any

import hydra
import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Subset

from tedlab.config import DataConfig, Packing
from tedlab.data.corpus import Corpus, prepare_corpus
from tedlab.data.packing import BestFitSamples, PackedSamples
from tedlab.data.position import Position
from tedlab.data.ramp import Ramp
from tedlab.data.resume import align_fit_loop
from tedlab.data.sampler import MicroBatchSampler

Samples = PackedSamples | BestFitSamples | Subset


def data_class(data: DataConfig) -> type[LightningDataModule]:
    """Returns the class that ``data.module`` names.

    It is made with ``(data, sequence_length, seed)``, and its loaders give each data rank int64 token ids of shape
    (micro_batch_size, sequence_length + 1). It may also have ``vocab_size`` (else ``model.vocab_size`` must be given),
    ``bytes_per_token`` (else 1), and ``state_dict`` and ``load_state_dict``, by which a resumed run reads on; their
    entry ``batch_size``, if there is one, stays that of the checkpoint.

    Raises:
        ValueError: If it cannot be imported or is no LightningDataModule. The message says why.
    """
    try:
        kind = hydra.utils.get_class(data.module)
    except Exception as error:  # an import may raise anything
        raise ValueError(f"data.module={data.module} cannot be imported: {error}") from None
    if not issubclass(kind, LightningDataModule):
        raise ValueError(f"data.module={data.module} is not a LightningDataModule")
    return kind


def data_module(data: DataConfig, sequence_length: int, seed: int) -> LightningDataModule:
    """Makes the data module of a configuration, see :func:`data_class`."""
    return data_class(data)(data, sequence_length, seed)


def keeps_position(kind: type[LightningDataModule]) -> bool:
    """Tells whether a run that is resumed with this module reads on where its checkpoint was saved."""
    return all(
        getattr(kind, name) is not getattr(LightningDataModule, name) for name in ("state_dict", "load_state_dict")
    )


class TextDataModule(LightningDataModule):
    """Provides batches of packed text: int64 tensors of shape (micro_batch_size, sequence_length + 1).

    ``trainer.strategy.distributed_sampler_kwargs`` gives each process its data rank; processes of the same data rank
    read the same batches. A run resumed from a checkpoint continues with the next sample, also under another layout.

    Args:
        data: Where the text is and how it is batched.
        sequence_length: Number of inputs in a sample.
        seed: Seed of the order of training samples.
    """

    def __init__(self, data: DataConfig, sequence_length: int, seed: int) -> None:
        super().__init__()
        self.data = data
        self.sequence_length = sequence_length
        self.seed = seed
        self.ramp = Ramp.of(data, sequence_length)
        self._corpus: Corpus | None = None
        self._made: dict[bool, PackedSamples | BestFitSamples] = {}  # samples of the training split, or not
        self._loaded: dict[str, Any] | None = None  # state from a checkpoint, until the first loader uses it
        self._start, self._steps_before = Position(), 0  # where in the data, and at which step, this run began

    @property
    def corpus(self) -> Corpus:
        """The tokenised corpus, prepared on first use; see :func:`prepare_corpus` for the errors."""
        if self._corpus is None:
            self._corpus = prepare_corpus(self.data, self.sequence_length)
        return self._corpus

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the tokenizer knows."""
        return self.corpus.tokenizer.vocab_size

    @property
    def separator(self) -> int:
        """The token that ends each document."""
        return self.corpus.tokenizer.separator

    @property
    def bytes_per_token(self) -> float:
        """See :class:`Corpus`."""
        return self.corpus.bytes_per_token

    @property
    def validation_samples(self) -> int:
        """Number of samples in a validation pass over all data ranks: whole batches, up to ``data.validation_samples``.

        Raises:
            ValueError: If there is less than one whole batch.
        """
        available = len(self._samples(self.corpus.validation))
        batch_size = self.data.batch_size
        samples = min(self.data.validation_samples, available) // batch_size * batch_size
        if samples == 0:
            raise ValueError(
                f"Validation needs at least one batch of data.batch_size={batch_size} samples, but "
                f"data.validation_samples={self.data.validation_samples} and the validation split holds {available} "
                f"samples of sequence_length={self.sequence_length}. Raise data.validation_samples or "
                f"data.validation_fraction, lower data.batch_size, or use more text."
            )
        return samples

    @property
    def training_samples(self) -> Samples:
        """The samples of an epoch: all of the training split, or those of ``data.training_batches`` batches."""
        samples = self._samples(self.corpus.train)
        if self.data.training_batches is None:
            return samples
        return Subset(samples, range(min(len(samples), self.data.training_batches * self.data.batch_size)))

    def prepare_data(self) -> None:
        prepare_corpus(self.data, self.sequence_length)

    def setup(self, stage: str) -> None:
        """Checks that this process found the same corpus as the first one: files may change between the searches.

        Raises:
            ValueError: If this process found another corpus.
        """
        assert self.trainer is not None
        own = self.corpus.directory.name
        if own != self.trainer.strategy.broadcast(own):
            raise ValueError(
                f"The processes found different files below data.path={self.data.path!r}, or different contents: "
                "something writes there, perhaps this run itself. Copy the corpus to a folder of its own."
            )

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        samples = self.training_samples
        sampler = self._sampler(samples, self.ramp, shuffle=True)
        step = self.trainer.global_step
        if self._loaded is not None:
            self._start, self._steps_before = self._position(self._loaded, len(samples), step), step
            self._loaded = None
        sampler.start_at(self._start, self._steps_before)
        if self.trainer.fit_loop.is_resuming:
            size = self.ramp.at(step).batch_size
            accumulated = size // (self.data.micro_batch_size * sampler.num_replicas)
            read = self._start.offset // size
            align_fit_loop(self.trainer, self._start.epoch, read * accumulated, step * accumulated)
        return self._loader(samples, sampler)

    def val_dataloader(self) -> DataLoader:
        samples = Subset(self._samples(self.corpus.validation), range(self.validation_samples))
        return self._loader(samples, self._sampler(samples, self.data.batch_size, shuffle=False))

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the next sample, with the seed and number of samples that define the order."""
        assert self.trainer is not None
        if self._loaded is not None:  # no sample has been read since
            return self._loaded
        samples, before = len(self.training_samples), self._steps_before
        position = self.ramp.after(self._start, before, self.trainer.global_step, samples)
        sizes = {"batch_size": self.data.batch_size, "ramp": [asdict(stage) for stage in self.data.ramp]}
        return {**asdict(position), "of": samples, "seed": self.seed, **sizes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def _position(self, state: dict[str, Any], samples: int, step: int) -> Position:
        """Returns where a step begins: a checkpoint's position, or the next epoch if text or order have changed."""
        if "epoch" not in state:  # saved before batch sizes could change
            whole = samples // self.data.batch_size * self.data.batch_size
            return Position(*divmod(state["samples"], whole)).of_next_step(self.data.batch_size, samples)
        saved = Position(state["epoch"], state["offset"])
        if (state["of"], state["seed"]) != (samples, self.seed):
            rank_zero_warn("Other text or another seed than the checkpoint's: its samples begin with a new epoch.")
            return Position(saved.epoch + 1)
        return saved.of_next_step(self.ramp.at(step).batch_size, samples)

    def _samples(self, tokens: np.ndarray) -> PackedSamples | BestFitSamples:
        """Returns the samples of a split, made once."""
        key = tokens is self.corpus.train
        if key not in self._made:
            self._made[key] = (
                BestFitSamples(tokens, self.separator, self.sequence_length)
                if self.data.packing == Packing.BEST_FIT
                else PackedSamples(tokens, self.sequence_length)
            )
        return self._made[key]

    def _sampler(self, samples: Samples, batch_size: int | Ramp, shuffle: bool) -> MicroBatchSampler:
        assert self.trainer is not None
        # Lightning's strategy for a single device has no such attribute.
        ranks = getattr(self.trainer.strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})
        return MicroBatchSampler(
            samples,
            num_replicas=ranks["num_replicas"],
            rank=ranks["rank"],
            batch_size=batch_size,
            micro_batch_size=self.data.micro_batch_size,
            seed=self.seed,
            shuffle=shuffle,
        )

    def _loader(self, samples: Samples, sampler: MicroBatchSampler) -> DataLoader:
        assert self.trainer is not None
        return DataLoader(
            samples,
            batch_size=self.data.micro_batch_size,
            sampler=sampler,
            drop_last=True,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            num_workers=self.data.num_workers,
            # Workers only read a memory map; with the launcher's start method each would import torch for seconds.
            multiprocessing_context="fork" if self.data.num_workers else None,
            persistent_workers=self.data.num_workers > 0,
        )
