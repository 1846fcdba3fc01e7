"""Token ids from outside: one that the vocabulary does not have must not become a loss."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tedlab._compat.torch import assert_on_device

_checking = True


@contextmanager
def unchecked() -> Iterator[None]:
    """Within, ids are taken on trust, as those are that have been checked, or that have no values."""
    global _checking
    before, _checking = _checking, False
    try:
        yield
    finally:
        _checking = before


def check_ids(ids: Tensor, vocab_size: int, what: str, ignore_index: int | None = None) -> None:
    """Refuses ids outside the vocabulary, but within :func:`unchecked`.

    On a CPU the error is raised here. Elsewhere the device checks when it comes to it, so that the host need not wait:
    the process then ends by an assertion of the device that names the vocabulary but not the id.

    Args:
        ids: int64, of any shape.
        vocab_size: number of tokens.
        what: that they are, in the singular; begins the message.
        ignore_index: a value that is allowed, too.

    Raises:
        IndexError: names the first such id and the vocabulary's size.
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
