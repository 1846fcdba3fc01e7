"""Moves a few numbers between device and host, which waits for what it reads no earlier than it needs it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
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


def deliver(parts: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copies integers to the device, all in one copy, for which the host does not wait.

    Args:
        parts: Integers of any shapes.
        device: The device.

    Returns:
        An int64 tensor of the shape of each part; they share their memory.
    """
    flat = torch.tensor([number for part in parts for number in part.ravel().tolist()], dtype=torch.int64)
    if device.type == "cuda" and torch.cuda.is_initialized():
        flat = flat.pin_memory()  # from other memory the host would wait
    there = flat.to(device, non_blocking=True).split([part.size for part in parts])
    return [piece.view(part.shape) for piece, part in zip(there, parts, strict=True)]
