"""Tracks memory over time: every storage from its allocation to its end, by category.

This counts the bytes requested from the allocator. Workspaces inside kernels, memory that the allocator caches or
cannot use, NCCL's buffers and the CUDA context come on top.
"""

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tedlab._compat.torch import address_of, storage_address

Category = Literal["parameters", "optimizer", "gradients", "stash", "activations", "temporaries"]
CATEGORIES: tuple[Category, ...] = ("parameters", "optimizer", "gradients", "stash", "activations", "temporaries")


@dataclass(frozen=True)
class Timeline:
    """The memory over a step.

    Attributes:
        seconds: The predicted time of each change.
        held: The bytes held from each change on, by category.
    """

    seconds: np.ndarray
    held: dict[Category, np.ndarray]

    @property
    def total(self) -> np.ndarray:
        """The bytes of all categories, after each change."""
        return np.sum(list(self.held.values()), axis=0)

    def at_peak(self) -> dict[Category, int]:
        """Returns the bytes by category at the moment when their sum is largest."""
        peak = int(self.total.argmax())
        return {category: int(values[peak]) for category, values in self.held.items()}


class StorageTracker:
    """Tracks storages, whichever tensors share them.

    The purpose of a storage may show only later (a product of the backward pass becomes a gradient). :meth:`label` then
    applies to all of its life.

    Args:
        stash: Returns the bytes that CAC keeps at present, which are part of those allocated as activations.
    """

    def __init__(self, stash: Callable[[], int]) -> None:
        self._stash = stash
        self._alive: dict[int, tuple[int, weakref.ref]] = {}  # by address: the storage's number, and a reference
        self._sizes: list[int] = []
        self._categories: list[Category] = []
        self._changes: list[tuple[int, int, int, float]] = []  # storage, +1 or -1, stash, seconds
        self.now = 0.0  # predicted seconds since the start of the step

    def see(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Records the storages of tensors that are new."""
        for tensor in tensors:
            self.see_storage(tensor.untyped_storage(), category)

    def see_storage(self, storage: torch.UntypedStorage, category: Category) -> None:
        """Records a storage if it is new."""
        address = address_of(storage)
        if address in self._alive or not storage.nbytes():
            return
        number = len(self._sizes)
        self._sizes.append(storage.nbytes())
        self._categories.append(category)
        self._alive[address] = number, weakref.ref(storage, functools.partial(self._end, address))
        self._change(number, 1)

    def label(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Sets the category of the tensors' storages."""
        tensors = list(tensors)
        self.see(tensors, category)
        for tensor in tensors:
            found = self._alive.get(storage_address(tensor))
            if found is not None:
                self._categories[found[0]] = category

    def category_of(self, tensor: Tensor) -> Category | None:
        """Returns the category of a tensor's storage, or None if it was never seen."""
        found = self._alive.get(storage_address(tensor))
        return None if found is None else self._categories[found[0]]

    def timeline(self) -> Timeline:
        """Returns all changes so far."""
        storages, signs, stash, times = (np.array(column) for column in zip(*self._changes, strict=True))
        sizes = np.array(self._sizes)[storages] * signs
        of = np.array(self._categories)[storages]
        held = {category: np.cumsum(np.where(of == category, sizes, 0)) for category in CATEGORIES}
        held["stash"] = stash
        held["activations"] = held["activations"] - stash
        return Timeline(times, held)

    def _end(self, address: int, _: Any) -> None:
        number, _ = self._alive.pop(address)
        self._change(number, -1)

    def _change(self, number: int, sign: int) -> None:
        self._changes.append((number, sign, self._stash(), self.now))
