"""A stream of tokens as fixed-length samples.

Documents are packed end to end, each followed by the tokenizer's separator: no padding, no wasted position. Which
samples are read in which order is decided in ``sampler.py``.
"""

import numpy as np
import torch
from torch.utils.data import Dataset


class PackedSamples(Dataset[torch.Tensor]):
    """Windows of ``sequence_length + 1`` tokens, each starting ``sequence_length`` after the one before.

    The last token of a window is the first of the next, so that inputs ``[:-1]`` and targets ``[1:]`` of all windows
    together hold every token pair of the stream once. A tail too short for a window is left out.

    Args:
        tokens: The stream: any unsigned integer dtype, usually memory-mapped, shape (tokens,).
        sequence_length: Inputs of one sample.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.sequence_length

    def __getitem__(self, index: int) -> torch.Tensor:
        """Sample ``index``: int64, shape (sequence_length + 1,)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = index * self.sequence_length
        return torch.from_numpy(self.tokens[start : start + self.sequence_length + 1].astype(np.int64))
