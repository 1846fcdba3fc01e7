"""Reads the batches of a whole optimizer step before its first one is used."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any


class StepAhead:
    """A data loader whose batches are fetched a step at a time.

    Args:
        loader: The data loader, whose other attributes this object has, too.
        batches: Returns the number of batches in a step.
    """

    def __init__(self, loader: Any, batches: Callable[[], int]) -> None:
        self._loader, self._batches = loader, batches
        self._fetched: deque[list[Any]] = deque()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._fetched.clear()
        batches: Iterable[Any] = iter(self._loader)
        while step := list(islice(batches, self._batches())):
            self._fetched.append(step)
            yield from step

    def take(self) -> list[Any]:
        """Returns the batches of the next step; Lightning has fetched its first one by then."""
        return self._fetched.popleft()
