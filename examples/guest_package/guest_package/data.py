"""Data modules: one of ours with a change, and one that has nothing to do with text."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tedlab.config import DataConfig
from tedlab.data import TextDataModule


class BackwardsText(TextDataModule):
    """``data.module=guest_package.data.BackwardsText``: a model predicts what came before."""

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Any:
        return batch.flip(1)


class Counting(LightningDataModule, IterableDataset):
    """``data.module=guest_package.data.Counting``: samples that count upwards, from anywhere."""

    vocab_size = 256

    def __init__(self, data: DataConfig, sequence_length: int, seed: int) -> None:
        super().__init__()
        self.data, self.sequence_length, self.seed, self.begin = data, sequence_length, seed, 0

    def batch(self, number: int) -> Tensor:
        """Micro-batch of this number: (micro_batch_size, sequence_length + 1), in any layout the same."""
        generator = torch.Generator().manual_seed(self.seed + number)
        start = torch.randint(self.vocab_size, (self.data.micro_batch_size, 1), generator=generator)
        return (start + torch.arange(self.sequence_length + 1)) % self.vocab_size

    def __iter__(self) -> Iterator[Tensor]:
        ranks = self.trainer.strategy.distributed_sampler_kwargs  # a data rank reads every D-th micro-batch
        number = self.begin + ranks["rank"]
        while True:
            yield self.batch(number)
            number += ranks["num_replicas"]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([self.batch(-1 - n) for n in range(8)], batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        steps = self.trainer.global_step
        return {
            "read": steps * (self.data.batch_size // self.data.micro_batch_size),
            "batch_size": self.data.batch_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.begin = state_dict["read"]
