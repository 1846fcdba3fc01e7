"""A data module: the corpus read from its end, so that a model predicts what came before."""

from typing import Any

from torch import Tensor

from tedlab.data import TextDataModule


class BackwardsText(TextDataModule):
    """``data.module=guest_package.data.BackwardsText``."""

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Any:
        return batch.flip(1)
