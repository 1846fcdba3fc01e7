"""Reads a few numbers of the device on the host, which waits for them no earlier than it needs them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Reader = Callable[[Tensor], Callable[[], list[Any]]]


def start(values: Tensor) -> Callable[[], list[Any]]:
    """Starts to copy a tensor's values to the host.

    On a GPU the copy waits its turn among the device's work. Work that is issued between the two calls does not delay
    the host, and the device is busy with it while the host waits.

    Args:
        values: A small tensor.

    Returns:
        A function that waits for the copy, and for nothing issued after it, and returns what ``values.tolist()`` did
        when it started.
    """
    if not values.is_cuda:
        found = values.tolist()
        return lambda: found
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)  # into other memory the copy would wait
    copy.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))

    def wait() -> list[Any]:
        copied.synchronize()
        return copy.tolist()

    return wait
