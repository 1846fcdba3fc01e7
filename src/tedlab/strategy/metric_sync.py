"""Makes torchmetrics' metrics combine what processes have counted so that each sample counts once.

By default, metrics gather from all processes, but tensor ranks have counted the same samples.
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
    """Makes every metric in a module gather from data ranks, unless it has its own process group or sync function."""
    gather = _FromDataRanks(module, comm)
    for metric in module.modules():
        if isinstance(metric, Metric) and metric.process_group is None:
            earlier = metric.dist_sync_fn  # may be ours, left by an earlier run
            metric.dist_sync_fn = gather if earlier is None or isinstance(earlier, _FromDataRanks) else earlier


class _FromDataRanks:
    """Gathers a metric from data ranks as long as its module belongs to this trainer, even in hooks after the run.

    After that, it gathers as torchmetrics does, because another strategy would not replace this object.
    """

    def __init__(self, module: LightningModule, comm: Collectives) -> None:
        self._module, self._trainer, self._comm = weakref.ref(module), weakref.ref(module.trainer), comm

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FromDataRanks":
        return self  # copies of a metric share it

    def __call__(self, state: Tensor, group: Any | None = None) -> list[Tensor]:
        module = self._module()
        moved = module is not None and trainer_of(module) is not self._trainer()
        return gather_all_tensors(state, group) if moved or group is not None else gather_ragged(state, self._comm)


def gather_ragged(x: Tensor, comm: Collectives) -> list[Tensor]:
    """Returns every data rank's ``x``; sizes may differ, but not the number of dimensions. Waits for the device."""
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
    parts[comm.rank("data")] = x  # keeps its gradient, as in torchmetrics
    return parts
