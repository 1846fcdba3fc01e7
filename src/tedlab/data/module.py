"""The Lightning data module: its loaders read the same samples in the same order under every layout."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from tedlab._compat.python import shorten_paths_of_sockets
from tedlab.config import DataConfig, Packing
from tedlab.data.corpus import Corpus, prepare_corpora
from tedlab.data.mixture import MixedOrder, MixedSampler, Mixture, check_enough, continued, shares_of, state_of
from tedlab.data.packing import BestFitSamples, PackedSamples
from tedlab.data.position import Position
from tedlab.data.ramp import Ramp
from tedlab.data.resume import align_fit_loop
from tedlab.data.sampler import MicroBatchSampler
from tedlab.data.tokenizers import SAVED, ByteTokenizer, Tokenizer

Samples = PackedSamples | BestFitSamples | Subset | ConcatDataset


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
        self._corpora: dict[str, Corpus] | None = None
        self._made: dict[str, PackedSamples | BestFitSamples] = {}  # samples by source and split
        self._order: MixedOrder | None = None  # of a mixture, from where this run began
        self._loaded: dict[str, Any] | None = None  # state from a checkpoint, until the first loader uses it
        self._start, self._steps_before = Position(), 0  # where in the data, and at which step, this run began

    @property
    def corpora(self) -> dict[str, Corpus]:
        """The tokenised corpora by source, prepared on first use; see :func:`prepare_corpora` for the errors."""
        if self._corpora is None:
            self._corpora = prepare_corpora(self.data, self.sequence_length)
        return self._corpora

    @property
    def corpus(self) -> Corpus:
        """The one corpus of data without ``data.sources``."""
        (corpus,) = self.corpora.values()
        return corpus

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all corpora."""
        return next(iter(self.corpora.values())).tokenizer

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the tokenizer knows."""
        return self.tokenizer.vocab_size

    @property
    def separator(self) -> int:
        """The token that ends each document."""
        return self.tokenizer.separator

    @property
    def bytes_per_token(self) -> float:
        """See :class:`Corpus`; of a mixture, the mean over the samples of a validation pass."""
        if not self.data.sources:
            return self.corpus.bytes_per_token
        taken = [name for name, _ in self._validation_order()]
        return sum(taken.count(name) * corpus.bytes_per_token for name, corpus in self.corpora.items()) / len(taken)

    @property
    def validation_samples(self) -> int:
        """Number of samples in a validation pass over all data ranks: whole batches, up to ``data.validation_samples``.

        Raises:
            ValueError: If there is less than one whole batch.
        """
        available = sum(len(self._samples(name, "validation")) for name in self.corpora)
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
        if self.data.sources:
            return ConcatDataset([self._samples(name, "train") for name in self.corpora])
        samples = self._samples("", "train")
        if self.data.training_batches is None:
            return samples
        return Subset(samples, range(min(len(samples), self.data.training_batches * self.data.batch_size)))

    def prepare_data(self) -> None:
        prepare_corpora(self.data, self.sequence_length)

    def setup(self, stage: str) -> None:
        """Checks that this process found the same corpus as the first one: files may change between the searches.

        Raises:
            ValueError: If this process found another corpus.
        """
        assert self.trainer is not None
        own = [  # not where it lies: nodes may have copies in different places
            (corpus.digest or corpus.directory.name, len(corpus.validation), corpus.tokenizer.fingerprint)
            for corpus in self.corpora.values()
        ]
        if own != self.trainer.strategy.broadcast(own):
            where = "data.sources" if self.data.sources else f"data.path={self.data.path!r}"
            where = self.data.stream.dataset or where
            raise ValueError(
                f"The processes found different files below {where}, or different contents: "
                "something writes there, perhaps this run itself. Copy the corpus to a folder of its own."
            )

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        samples = self.training_samples
        sampler = self._sampler(samples, self.ramp, shuffle=True)
        step = self.trainer.global_step
        if self.data.sources and self._order is None:
            self._order = MixedOrder(self._begun(self._loaded), self.seed)
        if self._loaded is not None:
            self._start, self._steps_before = self._position(self._loaded, len(samples), step), step
            self._loaded = None
        if isinstance(sampler, MixedSampler):
            assert self._order is not None
            sampler.order = MixedOrder(self._order.after(0), self.seed)
        sampler.start_at(self._start, self._steps_before)
        if self.trainer.fit_loop.is_resuming:
            size = self.ramp.at(step).batch_size
            accumulated = size // (self.data.micro_batch_size * sampler.num_replicas)
            read = self._start.offset // size
            align_fit_loop(self.trainer, self._start.epoch, read * accumulated, step * accumulated)
        return self._loader(samples, sampler)

    def val_dataloader(self) -> DataLoader:
        samples: Dataset
        if self.data.sources:
            places, before = {}, 0
            for name in self.corpora:
                places[name], before = before, before + len(self._samples(name, "validation"))
            samples = ConcatDataset([self._samples(name, "validation") for name in self.corpora])
            samples = Subset(samples, [places[name] + read for name, read in self._validation_order()])
        else:
            samples = Subset(self._samples("", "validation"), range(self.validation_samples))
        return self._loader(samples, self._sampler(samples, self.data.batch_size, shuffle=False))

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the next sample, with what its meaning depends on: text, seed and tokenizer."""
        assert self.trainer is not None
        if self._loaded is not None:  # no sample has been read since
            return self._loaded
        samples, before, step = len(self.training_samples), self._steps_before, self.trainer.global_step
        position = self.ramp.after(self._start, before, step, samples)
        sizes = {"batch_size": self.data.batch_size, "ramp": [asdict(stage) for stage in self.data.ramp]}
        state = {**asdict(position), "of": samples, "seed": self.seed, "tokenizer": self.tokenizer.fingerprint, **sizes}
        if self.data.sources:
            order = self._order or MixedOrder(self._begun(None), self.seed)
            state["sources"] = state_of(order.after(self.ramp.samples(before, step)))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.refuse_other_tokenizer(state_dict)
        self._loaded = state_dict

    def refuse_other_tokenizer(self, state: dict[str, Any], checkpoint: Path | None = None) -> None:
        """Checks that tokens mean what they meant: a BPE is another one if it is trained on other sources.

        Args:
            state: What :meth:`state_dict` returned for a checkpoint.
            checkpoint: Where that is, for the message.

        Raises:
            ValueError: If the checkpoint's run had another tokenizer.
        """
        theirs = state.get("tokenizer", self.tokenizer.fingerprint)  # an older checkpoint does not say
        if theirs == self.tokenizer.fingerprint:
            return
        folders = [] if checkpoint is None else checkpoint.absolute().parents[:2]
        saved = next((folder / SAVED for folder in folders if (folder / SAVED).is_file()), f"the {SAVED} of its run")
        raise ValueError(
            f"The checkpoint's model has learned tokens of the tokenizer {theirs}, and data.tokenizer="
            f"{self.data.tokenizer} is {self.tokenizer.fingerprint}: the same ids would mean other text. Use "
            f"data.tokenizer={theirs if theirs == ByteTokenizer.fingerprint else saved}"
        )

    def _position(self, state: dict[str, Any], samples: int, step: int) -> Position:
        """Returns where a step begins: a checkpoint's position, or the next epoch if text or order have changed."""
        if "epoch" not in state:  # saved before batch sizes could change
            whole = samples // self.data.batch_size * self.data.batch_size
            return Position(*divmod(state["samples"], whole)).of_next_step(self.data.batch_size, samples)
        saved = Position(state["epoch"], state["offset"])
        same = (state["of"], state["seed"], "sources" in state) == (samples, self.seed, bool(self.data.sources))
        if not same:
            if not self.data.sources:  # a mixture's sources go on where they were
                rank_zero_warn("Other text or another seed than the checkpoint's: its samples begin with a new epoch.")
            return Position(saved.epoch + 1)
        return saved.of_next_step(self.ramp.at(step).batch_size, samples)

    def mixture(self, state: dict[str, Any] | None, first: int, last: int) -> tuple[Mixture, list[str]]:
        """Returns the mixture of a run that begins, or goes on from a checkpoint.

        Args:
            state: What :meth:`state_dict` returned for the checkpoint; None or without sources: all of them begin.
            first: The step that is next.
            last: The step after the last; if it comes before ``first``, nobody knows it.

        Returns:
            The mixture, and sentences on what is not as it was.

        Raises:
            ValueError: If a source has too little text, or all of them for so many steps.
        """
        shares = shares_of(
            self.data,
            {name: len(self._samples(name, "train")) for name in self.corpora},
            {name: corpus.digest for name, corpus in self.corpora.items()},
        )
        saved = (state or {}).get("sources", {})
        reseeded = saved and state is not None and state["seed"] != self.seed
        if reseeded:
            saved = {name: {**source, "epoch": source["epoch"] + 1, "offset": 0} for name, source in saved.items()}
        mixture, said = continued(shares, saved)
        check_enough(mixture, self.ramp.samples(first, last))
        if reseeded:
            said.append("Another seed than the checkpoint's: each of data.sources begins with a new epoch.")
        return mixture, said if state else []

    def _begun(self, state: dict[str, Any] | None) -> Mixture:
        assert self.trainer is not None
        mixture, said = self.mixture(state, self.trainer.global_step, self.trainer.max_steps)
        if said and self.trainer.is_global_zero:
            print(*said, sep="\n", flush=True)
        return mixture

    def _validation_order(self) -> list[tuple[str, int]]:
        """Returns the source of each sample of a validation pass, and its place in that source's split."""
        sizes = {name: len(self._samples(name, "validation")) for name in self.corpora}
        shares = shares_of(self.data, {name: len(self._samples(name, "train")) for name in self.corpora})
        once = {name: replace(share, size=sizes[name], most=sizes[name]) for name, share in shares.items()}
        return [*Mixture(once).take(self.validation_samples)]

    def _samples(self, name: str, split: str) -> PackedSamples | BestFitSamples:
        """Returns the samples of a split of a source, made once."""
        key = f"{split} {name}"
        if key not in self._made:
            tokens: np.ndarray = getattr(self.corpora[name], split)
            self._made[key] = (
                BestFitSamples(tokens, self.separator, self.sequence_length)
                if self.data.packing == Packing.BEST_FIT
                else PackedSamples(tokens, self.sequence_length)
            )
        return self._made[key]

    def _sampler(self, samples: Any, batch_size: int | Ramp, shuffle: bool) -> MicroBatchSampler:
        assert self.trainer is not None
        # Lightning's strategy for a single device has no such attribute.
        ranks = getattr(self.trainer.strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})
        kind = MixedSampler if shuffle and self.data.sources else MicroBatchSampler
        return kind(
            samples,
            num_replicas=ranks["num_replicas"],
            rank=ranks["rank"],
            batch_size=batch_size,
            micro_batch_size=self.data.micro_batch_size,
            seed=self.seed,
            shuffle=shuffle,
        )

    def _loader(self, samples: Dataset, sampler: MicroBatchSampler) -> DataLoader:
        assert self.trainer is not None
        if self.data.num_workers:  # they hand samples over by sockets
            shorten_paths_of_sockets()
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
