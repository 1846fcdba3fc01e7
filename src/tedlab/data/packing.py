"""Cuts a stream of tokens into samples of fixed length.

Documents are packed end to end, each followed by the tokenizer's separator, so no position is padding. ``sampler.py``
decides which samples are read in which order.
"""

import numpy as np
import torch
from torch.utils.data import Dataset


class PackedSamples(Dataset[torch.Tensor]):
    """Windows of ``sequence_length + 1`` tokens, each starting ``sequence_length`` after the one before.

    The last token of a window is the first of the next, so inputs ``[:-1]`` and targets ``[1:]`` of all windows
    together hold every token pair of the stream once. A tail too short for a window is dropped.

    Args:
        tokens: Token ids, shape (tokens,), any unsigned integer dtype, usually memory-mapped.
        sequence_length: Number of inputs in a sample.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.sequence_length

    def __getitem__(self, index: int) -> torch.Tensor:
        """Returns sample ``index``: int64, shape (sequence_length + 1,)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = index * self.sequence_length
        return torch.from_numpy(self.tokens[start : start + self.sequence_length + 1].astype(np.int64))
