"""Lets a process join the others that a launcher started, for commands without a Trainer."""

import os
from datetime import timedelta

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from torch import distributed as dist

from tedlab.launch.outside import started_outside


def join(backend: str, timeout: timedelta | None = None) -> None:
    """Initialises the process group of what tedlab, torchrun or srun has started."""
    if not started_outside() or "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        return
    slurm = SLURMEnvironment()
    address = f"tcp://{slurm.main_address}:{slurm.main_port}"
    dist.init_process_group(
        backend, init_method=address, rank=slurm.global_rank(), world_size=slurm.world_size(), timeout=timeout
    )


def local_rank() -> int:
    """Returns this process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def local_world_size() -> int:
    """Returns how many processes are on this machine; under srun, which may start fewer on the last, on the first."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")  # 8, or 8(x3),2
    return int(tasks.partition(",")[0].partition("(")[0])


def own_device(kind: str) -> torch.device:
    """Returns this process's device, ``cpu`` or one of the machine's GPUs, and makes that the current one."""
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device(kind, local_rank())
    torch.cuda.set_device(device)
    return device
