"""Checks token ids from outside: an id that is not in the vocabulary must not become a loss."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tedlab._compat.torch import assert_on_device

_checking = True


@contextmanager
def unchecked() -> Iterator[None]:
    """Turns off the check inside the context, for ids that have been checked already or that have no values."""
    global _checking
    before, _checking = _checking, False
    try:
        yield
    finally:
        _checking = before


def check_ids(ids: Tensor, vocab_size: int, what: str, ignore_index: int | None = None) -> None:
    """Refuses ids outside the vocabulary, unless inside :func:`unchecked`.

    On a CPU this raises the error. Elsewhere the device checks later, so that the host need not wait; the process then
    ends with a device assertion that names the vocabulary but not the id.

    Args:
        ids: int64 of any shape.
        vocab_size: Number of tokens.
        what: What an id is, in the singular; it begins the message.
        ignore_index: A value that is allowed as well.

    Raises:
        IndexError: If an id is outside; it names the first such id and the vocabulary's size.
    """
    if not _checking:
        return
    known = (ids >= 0) & (ids < vocab_size)
    if ignore_index is not None:
        known |= ids == ignore_index
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        assert_on_device(known.all(), f"{what} lies outside the vocabulary of {vocab_size} tokens")
    elif not known.all():
        allowed = f"0 to {vocab_size - 1}" + ("" if ignore_index is None else f", or {ignore_index} to be ignored")
        raise IndexError(
            f"{what} is {ids[~known][0].item()}, but the vocabulary has {vocab_size} tokens: valid are {allowed}"
        )
