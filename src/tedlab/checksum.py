"""A number for the bits of tensors: exact, computed on their device, and read by nobody here."""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

_COLUMNS = 1 << 16  # weights
_ROWS = {"cpu": 4}  # that are summed at a time: what fits a cache, or on other devices what keeps them busy
_MANY_ROWS = 128
_FACTOR = 0x5851F42D4C957F2D  # of what was summed before; odd, so that none is forgotten


def checksum(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """An int64 scalar on ``device`` that is equal for equal tensors, in the same order, and else hardly ever.

    Tensors are words of at most 32 bits. Each is multiplied by a random weight of its place, and all are added in whole
    numbers modulo 2^64: one changed word always shows, and several (or some that have changed places) but once in
    about 2^60 times. The order of the additions does not matter. Takes 64 MiB of a GPU's memory for a while.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    weights = _weights(device)
    room = torch.zeros(_ROWS.get(device.type, _MANY_ROWS) * _COLUMNS, dtype=torch.int64, device=device)
    filled = 0
    for tensor in tensors:
        words = _words(tensor)
        while len(words):
            part = words[: len(room) - filled]
            room[filled : filled + len(part)].copy_(part)
            words, filled = words[len(part) :], filled + len(part)
            if filled == len(room):
                total, filled = total * _FACTOR + _weighted(room, weights), 0
    room[filled:].zero_()
    return total * _FACTOR + _weighted(room, weights)


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor, as whole numbers."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    if flat.itemsize == 2 and len(flat) % 2 == 0:  # two at a time, for which they must begin at a whole word
        flat = flat.clone() if flat.storage_offset() % 2 else flat
        return flat.view(torch.int32)
    return flat.view({1: torch.int8, 2: torch.int16}.get(flat.itemsize, torch.int32))


def _weighted(room: Tensor, weights: Tensor) -> Tensor:
    """Sum of words times weights. The words are gone afterwards."""
    rows = room.view(-1, _COLUMNS).mul_(weights).sum(1)
    return (rows * weights[: len(rows)]).sum()


@functools.cache
def _weights(device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**63), 2**63 - 1, (_COLUMNS,), generator=draw) | 1).to(device)
