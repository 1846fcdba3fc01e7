"""Detects processes that torchrun or srun has started, and checks that their environment is complete.

Without the check, a process that only looks like one of several waits for the others until the connection times out.
"""

import os

from tedlab.errors import WrongEnvironment

_LEAST_SPECIAL_STEP = 0xFFFFFFF0  # from here on SLURM numbers the steps of batch scripts, interactive shells and so on


def started_outside() -> bool:
    """Returns whether a launcher such as torchrun or srun has started this process as one of several."""
    return "LOCAL_RANK" in os.environ or _slurm_tasks() > 1


def first_outside() -> bool:
    """Returns whether this process is the first of those that a launcher has started."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def restarts() -> int:
    """Returns how often torchrun has restarted the processes (see its ``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def check(processes: int | None = None) -> None:
    """Checks that the processes that the environment describes were really started.

    Args:
        processes: The number of processes that this run needs over all nodes; None skips the comparison.

    Raises:
        WrongEnvironment: If they were not; the message says what was found, what is missing, and what to run instead.
    """
    if "LOCAL_RANK" in os.environ:
        _check_launched()
        found, name = os.environ.get("WORLD_SIZE"), "WORLD_SIZE"
    elif _slurm_tasks() > 1:
        _check_srun()
        found, name = os.environ.get("SLURM_NTASKS"), "SLURM_NTASKS"
    else:
        return
    if processes is not None and found is not None and found != str(processes):
        raise WrongEnvironment(
            f"{name} is {found}: so many processes were started; but parallel.world_size is {processes}. Start "
            f"{processes} (torchrun --nproc-per-node, srun --ntasks), or set parallel.world_size={found} with degrees "
            "that divide it"
        )


def _check_launched() -> None:
    needed = ["MASTER_ADDR", "MASTER_PORT"]
    if not os.environ.get("NODE_RANK"):  # from it Lightning's own scheme computes these two
        needed = ["RANK", "WORLD_SIZE", *needed]
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise WrongEnvironment(
            f"LOCAL_RANK={os.environ['LOCAL_RANK']} is set, as in a process that torchrun has started, but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: the other processes could not be found. "
            "Use `torchrun --nproc-per-node=N -m tedlab.train …`, or `unset LOCAL_RANK`, and tedlab starts its "
            "processes itself"
        )


def _slurm_tasks() -> int:
    return int(os.environ.get("SLURM_NTASKS") or 1)


def _check_srun() -> None:
    step = os.environ.get("SLURM_STEP_ID", os.environ.get("SLURM_STEPID"))
    found = f"SLURM_NTASKS is {_slurm_tasks()}"
    if step is None:
        missing = "SLURM_STEP_ID is not set"
    elif int(step) >= _LEAST_SPECIAL_STEP:
        missing = f"SLURM_STEP_ID={step} is the allocation's own shell"
    elif "SLURM_PROCID" not in os.environ:
        missing = "SLURM_PROCID is not set"
    elif os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
        missing = "SLURM_STEP_NUM_TASKS is 1"
    else:
        return
    raise WrongEnvironment(
        f"{found}, but this process was not started by srun as one of them ({missing}; job "
        f"{os.environ.get('SLURM_JOB_NAME', 'without a name')}): nobody has started the others. Use `srun python -m "
        "tedlab.train …`, or `unset SLURM_NTASKS`, and tedlab starts its processes itself, on this node"
    )
