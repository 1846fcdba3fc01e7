"""How metrics of torchmetrics put together what processes have counted: each sample once.

By themselves they gather from all processes, and tensor ranks have counted the same samples.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from tedlab.comm import Collectives


def sync_over_data_ranks(module: nn.Module, comm: Collectives) -> None:
    """Makes every metric below a module gather from data ranks, unless it was told how, or among whom, to gather."""
    for metric in module.modules():
        if isinstance(metric, Metric) and metric.dist_sync_fn is None and metric.process_group is None:
            metric.dist_sync_fn = _gathering(comm)


def _gathering(comm: Collectives) -> Callable[..., list[Tensor]]:
    # A function, which a copy of a metric shares; process groups cannot be copied.
    def gather(state: Tensor, group: Any | None = None) -> list[Tensor]:
        return gather_all_tensors(state, group) if group is not None else gather_ragged(state, comm)

    return gather


def gather_ragged(x: Tensor, comm: Collectives) -> list[Tensor]:
    """Every data rank's ``x``, of as many dimensions, each of which may differ in size. Waits for the device."""
    if comm.size("data") == 1:
        return [x]
    shapes = [list(x.shape)] * comm.size("data")
    if x.dim():
        shape = torch.tensor([x.shape], dtype=torch.int64, device=x.device)  # (1, dimensions)
        shapes = comm.all_gather(shape, "data", tag="metrics.shapes", phase="metrics").tolist()
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    missing = [most - own for own, most in zip(x.shape, largest, strict=True)]
    widened = F.pad(x.detach(), [n for most in reversed(missing) for n in (0, most)])
    everybody = comm.all_gather(widened.unsqueeze(0), "data", tag="metrics.gather", phase="metrics")
    parts = [part[tuple(map(slice, shape))] for part, shape in zip(everybody, shapes, strict=True)]
    parts[comm.rank("data")] = x  # with its gradient, as torchmetrics does it
    return parts
