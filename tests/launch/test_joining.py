"""Processes of commands without a Trainer find each other by what srun sets, as training does."""

import os
import socket
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist

from tedlab.launch.joining import join, local_rank, local_world_size
from tedlab.predict.calibrate import calibration
from tests.pool import WorkerPool

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def srun(rank: int, job: int, host: str) -> dict[str, str]:
    """What srun sets in one of two tasks of a node."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NAME": "job",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODELIST": host,
    }


def joined(job: int, host: str, calibrates: bool) -> tuple[int, int, float, int, int]:
    rank = dist.get_rank()
    dist.destroy_process_group()
    with pytest.MonkeyPatch.context() as patch:
        for name in TORCHRUN:
            patch.delenv(name, raising=False)
        for name, value in srun(rank, job, host).items():
            patch.setenv(name, value)
        if calibrates:
            calibration._join("cpu")
        else:
            join("gloo", timedelta(seconds=60))
        total = torch.tensor(float(dist.get_rank() + 1))
        dist.all_reduce(total)
        return dist.get_rank(), dist.get_world_size(), total.item(), local_rank(), local_world_size()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
@pytest.mark.parametrize("calibrates", [False, True])
def test_tasks_of_srun_join_by_its_ranks_and_its_first_node(pool: WorkerPool, host: str, calibrates: bool) -> None:
    job = job_with_a_free_port()
    assert pool.run(2, joined, job, host, calibrates) == [(0, 2, 3.0, 0, 2), (1, 2, 3.0, 1, 2)]


@pytest.mark.parametrize(("tasks", "found"), [("8", 8), ("8(x3)", 8), ("8(x2),4", 8)])
def test_srun_says_how_many_tasks_a_node_has(monkeypatch: pytest.MonkeyPatch, tasks: str, found: int) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    assert local_world_size() == found


def test_torchruns_number_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1")
    assert local_world_size() == 4


def job_with_a_free_port() -> int:
    """Lightning derives the port from the last four digits of the job's number: 15000 and more."""
    for number in range(os.getpid() % 5000, 10_000):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", 15_000 + number))
            except OSError:
                continue
            return 120_000 + number
    raise AssertionError("no free port")
