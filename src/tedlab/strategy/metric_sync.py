"""How metrics of torchmetrics put together what processes have counted: each sample once.

By themselves they gather from all processes, and tensor ranks have counted the same samples.
"""

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from tedlab._compat.lightning import trainer_of
from tedlab.comm import Collectives


def sync_over_data_ranks(module: LightningModule, comm: Collectives) -> None:
    """Makes every metric below a module gather from data ranks, unless it was told how, or among whom, to gather."""
    gather = _FromDataRanks(module, comm)
    for metric in module.modules():
        if isinstance(metric, Metric) and metric.process_group is None:
            earlier = metric.dist_sync_fn  # ours, if an earlier run left it
            metric.dist_sync_fn = gather if earlier is None or isinstance(earlier, _FromDataRanks) else earlier


class _FromDataRanks:
    """How a metric gathers for as long as its module is this trainer's, in hooks after the run, too.

    Under another strategy, which does not replace it, torchmetrics' own way takes its place.
    """

    def __init__(self, module: LightningModule, comm: Collectives) -> None:
        self._module, self._trainer, self._comm = weakref.ref(module), weakref.ref(module.trainer), comm

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FromDataRanks":
        return self  # which a copy of a metric shares

    def __call__(self, state: Tensor, group: Any | None = None) -> list[Tensor]:
        module = self._module()
        moved = module is not None and trainer_of(module) is not self._trainer()
        return gather_all_tensors(state, group) if moved or group is not None else gather_ragged(state, self._comm)


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
