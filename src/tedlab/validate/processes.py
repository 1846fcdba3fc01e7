"""Checks that this machine has room and devices for the processes of a run."""

import os

import torch

from tedlab.config import Backend, TrainConfig


def check_processes(config: TrainConfig, most: int | None) -> None:
    """Checks a run's processes against this machine.

    Args:
        config: The configuration, whose trainer has been checked.
        most: The most processes on a CPU; None: as many as make sense for training.

    Raises:
        ValueError: If the run does not fit; the message says what would do.
    """
    devices, nodes = config.trainer["devices"], config.trainer["num_nodes"]
    world = config.parallel.world_size
    if devices * nodes != world:
        raise ValueError(
            f"trainer.devices × trainer.num_nodes = {devices}×{nodes} is not parallel.world_size ({world}). "
            f"On one machine set parallel.world_size alone; on {nodes} nodes also trainer.devices={world // nodes or 1}"
        )
    if config.trainer["accelerator"] == "cpu":
        cores = os.cpu_count() or 1
        most = most or max(8, 4 * cores)
        if devices > most:
            raise ValueError(
                f"{devices} processes on a machine of {cores} cores would hardly move; at most {most} make sense here. "
                "Use a smaller parallel=… preset, or more nodes (trainer.num_nodes)"
            )
        if config.comm.backend == Backend.NCCL:
            raise ValueError("comm.backend=nccl works on GPUs only; with trainer=cpu use gloo, or null")
        return
    gpus = torch.cuda.device_count()
    if not gpus:
        raise ValueError(
            f"trainer.accelerator={config.trainer['accelerator']}, but this machine has no GPU that torch can use; "
            "trainer=cpu needs none"
        )
    if devices > gpus and config.comm.backend != Backend.GLOO:
        raise ValueError(
            f"trainer.devices is {devices}, but this machine has {gpus} GPU{'s' if gpus > 1 else ''}: two processes on "
            f"one GPU NCCL refuses; use comm.backend=gloo or fewer processes (at most {gpus}), or trainer=cpu"
        )
