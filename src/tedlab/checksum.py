"""A number for the bits of tensors: exact, computed on their device, and read by nobody here."""

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_COLUMNS = 1 << 16  # weights
_ROWS = {"cpu": 4}  # that are multiplied at a time: what fits a cache, or on other devices what keeps them busy
_MANY_ROWS = 64
_FACTOR = 0x5851F42D4C957F2D  # of the pieces before; odd, so that none is forgotten


def checksum(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """An int64 scalar on ``device`` that is equal for equal tensors, in the same order, and else hardly ever.

    Tensors are words of at most 32 bits. Each is multiplied by a random weight of its place, and all are added in whole
    numbers modulo 2^64: one changed word always shows, and several (or some that have changed places) but once in
    about 2^60 times. The order of the additions does not matter.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for piece in _pieces(tensors, device):
        total = total * _FACTOR + _weighted(piece)
    return total


def _pieces(tensors: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Words of large tensors as they are, and of small ones together: a launch takes longer than they do."""
    largest = _COLUMNS * _ROWS.get(device.type, _MANY_ROWS)
    small: list[Tensor] = []
    for tensor in tensors:
        words = _words(tensor).to(device)
        if len(words) >= _COLUMNS:
            yield from words.split(largest)
            continue
        if sum(map(len, small)) + len(words) > _COLUMNS:
            yield torch.cat(small)
            small = []
        small.append(words.long())
    if small:
        yield torch.cat(small)


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    return flat.view({1: torch.int8, 2: torch.int16}.get(flat.itemsize, torch.int32))


def _weighted(words: Tensor) -> Tensor:
    weights = _weights(words.device)
    whole = len(words) // _COLUMNS * _COLUMNS
    sums = (words[:whole].view(-1, _COLUMNS) * weights).sum(1)
    rest = (words[whole:] * weights[: len(words) - whole]).sum()
    return (torch.cat((sums, rest.unsqueeze(0))) * weights[: len(sums) + 1]).sum()


@functools.cache
def _weights(device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**63), 2**63 - 1, (_COLUMNS,), generator=draw) | 1).to(device)
