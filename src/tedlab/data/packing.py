"""Makes samples of fixed length of a stream of tokens, in which each document is followed by a separator.

Documents are packed end to end, so that no position is padding, or whole, so that few are cut. ``sampler.py`` decides
which samples are read in which order.
"""

import heapq
from bisect import bisect_left, insort
from typing import NamedTuple

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


class Piece(NamedTuple):
    """A document, or a part of one that is too long.

    Attributes:
        start: Where it begins in the stream.
        tokens: How many there are, the separator included.
    """

    start: int
    tokens: int


PADDING = -1  # in place of a token id


class BestFitSamples(Dataset[torch.Tensor]):
    """Samples of whole documents, each in the sample that it leaves the least room in, the longest first.

    A document of more than ``sequence_length + 1`` tokens is cut into as long pieces as there can be, each of which
    begins with the last token of the one before. Documents of fewer than two tokens have no pair to learn and are left
    out. What is left of a sample is :data:`PADDING`. Samples depend on the stream alone.

    Args:
        tokens: Token ids, shape (tokens,), any unsigned integer dtype, usually memory-mapped.
        separator: The token that ends each document.
        sequence_length: Number of inputs in a sample.

    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (best-fit-decreasing).
    """

    def __init__(self, tokens: np.ndarray, separator: int, sequence_length: int) -> None:
        self.tokens, self.sequence_length = tokens, sequence_length
        self.samples = best_fit(pieces_of(tokens, separator, sequence_length + 1), sequence_length + 1)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Returns sample ``index``: int64, shape (sequence_length + 1,)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        sample = torch.full((self.sequence_length + 1,), PADDING, dtype=torch.int64)
        filled = 0
        for start, size in self.samples[index]:
            sample[filled : filled + size] = torch.from_numpy(self.tokens[start : start + size].astype(np.int64))
            filled += size
        return sample


def pieces_of(tokens: np.ndarray, separator: int, most: int) -> list[Piece]:
    """Returns the documents of a stream in order, in pieces of at most so many tokens."""
    ends = (np.flatnonzero(tokens == separator) + 1).tolist()
    if len(tokens) and (not ends or ends[-1] < len(tokens)):
        ends.append(len(tokens))
    pieces = []
    for start, end in zip([0, *ends], ends, strict=False):
        while end - start > most:
            pieces.append(Piece(start, most))
            start += most - 1
        if end - start > 1:
            pieces.append(Piece(start, end - start))
    return pieces


def best_fit(pieces: list[Piece], room: int) -> list[list[Piece]]:
    """Puts each piece, the longest first, where it leaves the least room; of equals, where a sample came first."""
    samples: list[list[Piece]] = []
    lefts: list[int] = []  # how much room samples have left, in order, each number once
    having: dict[int, list[int]] = {}  # heaps of the samples that have so much
    for piece in sorted(pieces, key=lambda piece: (-piece.tokens, piece.start)):
        place = bisect_left(lefts, piece.tokens)
        if place == len(lefts):
            number, left = len(samples), room
            samples.append([])
        else:
            left = lefts[place]
            number = heapq.heappop(having[left])
            if not having[left]:
                del having[left], lefts[place]
        samples[number].append(piece)
        left -= piece.tokens
        if left > 1:  # another piece has two tokens or more
            if left not in having:
                insort(lefts, left)
            heapq.heappush(having.setdefault(left, []), number)
    return samples
