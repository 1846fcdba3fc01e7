"""Several documents in one sample: which tokens are whose, what each may see, and where in its document it is."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from tedlab.nn.loss import IGNORE_INDEX


class Reading(NamedTuple):
    """How a model reads samples of several documents, each of which ends with a separator.

    Attributes:
        separator: The token that ends a document.
        masked: Whether a document sees nothing of others.
        padded: Whether samples may end with padding, which is -1.
    """

    separator: int = 0
    masked: bool = False
    padded: bool = False

    def of(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns ids and targets (B, S) of samples (B, S+1), and True where there is padding, or None.

        Padding becomes separators, which no router sees and which are no targets. If documents are masked, nothing is
        to be predicted from their separators: what follows is another document's.
        """
        ids, targets, padding = batch[:, :-1], batch[:, 1:], None
        if self.padded:
            padding = ids < 0
            ids, targets = ids.masked_fill(padding, self.separator), targets.masked_fill(targets < 0, IGNORE_INDEX)
        if self.masked:
            targets = targets.masked_fill(ids == self.separator, IGNORE_INDEX)
        return ids, targets, padding


def rows_of(batch: Tensor, length: int) -> Tensor:
    """Cuts samples (B, S+1) into rows (B·S/length, length+1), of which each begins where the one before it ends.

    They share that token, so every pair of tokens of a sample is in one row and nothing is lost.
    """
    return batch.unfold(1, length + 1, length).flatten(0, 1)


@dataclass(frozen=True)
class SampleDocuments:
    """The documents of a micro-batch.

    Attributes:
        position_BS: (B, S) int64, each token's position in its document.
        masks: What tokens see, by the window of attention: (B, 1, S, S) bool, or flex attention's block mask.
    """

    position_BS: Tensor
    masks: Mapping[int | None, Any]


def documents_of(ids: Tensor, separator: int, windows: Collection[int | None], flex: bool) -> SampleDocuments:
    """Finds the documents in token ids (B, S); a separator belongs to the document that it ends.

    Args:
        ids: (B, S) int64.
        separator: The token that ends a document.
        windows: How many tokens each attends to in some layer; None: all.
        flex: Whether to make masks of flex attention.
    """
    length, device = ids.shape[1], ids.device
    ends = (ids == separator).long()
    number_BS = ends.cumsum(1) - ends
    position = torch.arange(length, device=device)
    begins = torch.ones_like(number_BS, dtype=torch.bool)
    begins[:, 1:] = number_BS[:, 1:] != number_BS[:, :-1]
    start_BS = torch.where(begins, position, 0).cummax(1).values
    distance = position.unsqueeze(1) - position

    def mask(window: int | None) -> Any:
        if flex:
            return _block_mask(number_BS, window)
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return ((number_BS.unsqueeze(2) == number_BS.unsqueeze(1)) & seen).unsqueeze(1)

    return SampleDocuments(position - start_BS, {window: mask(window) for window in windows})


def _block_mask(number_BS: Tensor, window: int | None) -> Any:
    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (number_BS[b, query] == number_BS[b, key])
        return seen if window is None else seen & (query - key < window)

    batch, length = number_BS.shape
    return create_block_mask(visible, batch, None, length, length, device=str(number_BS.device))
