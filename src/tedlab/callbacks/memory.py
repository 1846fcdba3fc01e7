"""Breaks the peak memory of a run down into parameters, gradients, optimizer state and the rest."""

import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from tedlab.optim.bucket import local
from tedlab.strategy import TEDStrategy


class MemoryByCategory(Callback):
    """Divides each process's peak memory into categories.

    On a GPU the peak is that of torch's allocator. On a CPU it is that of the process's resident memory, which includes
    the interpreter and libraries: what was resident before the model existed is a category of its own.
    """

    def __init__(self) -> None:
        self._before = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._before = _present_bytes(trainer.strategy.root_device)

    def overall(self, trainer: Trainer) -> dict[str, Any]:
        """Returns bytes by category, each the maximum over processes. Collective; call it after training.

        - ``memory/peak_bytes``, and ``memory/peak_bytes_by_rank`` with one value per process;
        - ``memory/before_bytes``: memory in use before the model existed;
        - ``memory/parameters_bytes``: weights, with the padding that sharding adds;
        - ``memory/gradients_bytes``: gradients of all local parameters, their maximum after a backward pass;
        - ``memory/optimizer_bytes``: the process's shard of optimizer state and fp32 master weights;
        - ``memory/stash_bytes``: peak of the collectives' results kept for recomputation (CAC);
        - ``memory/activations_bytes``: the peak less all of these, so activations and whatever else was alive. It is 0
          if these fitted into memory that the process held without using it.
        """
        strategy = trainer.strategy
        assert isinstance(strategy, TEDStrategy)
        held = {"before": self._before, **_held_bytes(strategy)}
        peak = _peak_bytes(strategy.root_device)
        own = {"peak": peak, **held, "activations": max(0, peak - sum(held.values()))}
        everybody: list[Any] = [None] * trainer.world_size
        with strategy.topology.comm.place.within("gathering of totals"):
            dist.all_gather_object(everybody, own)
        most = {f"memory/{category}_bytes": max(rank[category] for rank in everybody) for category in own}
        return {**most, "memory/peak_bytes_by_rank": [rank["peak"] for rank in everybody]}


def _held_bytes(strategy: TEDStrategy) -> dict[str, int]:
    """Returns the bytes that training keeps in this process by category, with gradients at their maximum."""
    assert strategy.model is not None
    optimizers = strategy.sharded_optimizers
    buckets = [bucket for optimizer in optimizers for bucket in optimizer.buckets]
    trained = [p for bucket in buckets for p in bucket.parameters]
    frozen = {*strategy.model.parameters()}.difference(trained)
    state = [value for o in optimizers for values in o.optimizer.state.values() for value in values.values()]
    masters = [bucket.master for bucket in buckets if bucket.master is not bucket.shard]
    return {
        "parameters": sum(bucket.flat.nbytes for bucket in buckets) + sum(local(p).nbytes for p in frozen),
        "gradients": sum(local(p).nbytes for p in trained),
        "optimizer": sum(x.nbytes for x in [*state, *masters] if isinstance(x, torch.Tensor)),
        "stash": strategy.topology.recomputation.peak_kept_bytes,
    }


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _present_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = Path("/proc/self/statm")
    if not pages.exists():  # macOS: the standard library reports only the peak so far
        return _peak_bytes(device)
    return int(pages.read_text().split()[1]) * resource.getpagesize()
