"""Runs every rank of a world as a thread of this process, with real values, where a machine lacks the processes.

It uses the process group of torch's own multi-threaded tests, whose collectives copy between the threads' tensors.
(torch's LocalTensorMode runs one program on the tensors of all ranks, which does not suit Lightning's loop.)
"""

import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from tedlab._compat.simulation import ThreadedGroup, make_ranks_of_processes, make_ranks_of_threads
from tedlab.comm import raw
from tedlab.config import TrainConfig
from tedlab.predict.sim.world import OneOfMany

MOST_THREADS = 128


def run_in_threads(function: Callable[[TrainConfig], Any], config: TrainConfig) -> None:
    """Calls ``function(config)`` in every rank of ``config.parallel.world_size``, in float64.

    Raises:
        RuntimeError: If a rank fails, with the traceback of the first one; the others are ended. Also if this process
            is part of a process group already.
    """
    world = config.parallel.world_size
    if dist.is_initialized():
        raise RuntimeError("simulating needs a process of its own, but this one is part of a process group already")
    failures: list[str] = []
    store = dist.HashStore()

    def rank_of(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=world, store=store, timeout=timedelta(minutes=10))
        try:
            trainer = {**config.trainer, "devices": 1, "num_nodes": world, "plugins": [OneOfMany(world, rank)]}
            function(replace(config, trainer=trainer))
        except BaseException as error:
            failures.append(f"rank {rank} of {world} failed:\n{traceback.format_exc()}")
            ThreadedGroup.exception_handle(error)  # ends the ranks that wait for this one
        finally:
            dist.destroy_process_group()

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    # Lightning's 64-true sets the default for a while and then restores the old one; here both are the same.
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    make_ranks_of_threads()
    raw.ways["threaded"] = _Copying()
    try:
        with ThreadPoolExecutor(world, "rank") as pool:
            wait([pool.submit(rank_of, rank) for rank in range(world)])
    finally:
        del raw.ways["threaded"]
        make_ranks_of_processes()
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
    if failures:
        raise RuntimeError(failures[0])


class _Copying(raw.Functional):
    """Gathers into a copy, because this group cannot gather in place."""

    @override
    def all_gather_into(self, out: Tensor, x: Tensor, group: dist.ProcessGroup) -> raw.Wait:
        gathered = self.all_gather(x, group)
        return lambda: out.copy_(gathered())
