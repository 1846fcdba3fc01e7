"""A rendezvous in which processes that torchrun has restarted do not find what the previous attempt left behind.

torchrun may keep one store over all its attempts (torch 2.13 does for its c10d and its static rendezvous), and torch
looks up the same keys in every attempt, so that a process may connect to the address of one that is dead. torchrun's
restart count does not identify the attempt, since each node counts its own restarts.
"""

import os
import secrets
import time
from datetime import timedelta

from torch import distributed as dist


def store(rank: int, world_size: int, timeout: timedelta) -> dist.Store | None:
    """Returns a store that only the processes of this attempt use, or None where torch's own rendezvous is safe.

    Args:
        rank: The rank of this process.
        world_size: The number of processes.
        timeout: How long to wait for the other processes.

    Raises:
        TimeoutError: In the first process, if others did not start in time; the message names them.
        torch.distributed.DistNetworkError: If the store cannot be reached.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    agent = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, timeout=timeout)
    meeting = dist.PrefixStore("tedlab/rendezvous", agent)
    return dist.PrefixStore(f"tedlab/{_attempt(meeting, rank, world_size, timeout)}", agent)


def _attempt(meeting: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Returns a name for this attempt, which the first process draws and tells the others.

    Each process asks with a random token, so that an answer from a previous attempt cannot match its question. The
    first process keeps answering, dead processes' questions included, until all have confirmed the name.
    """
    if rank > 0:
        question = secrets.token_hex(8)
        meeting.set(f"question/{rank}", question)
        name = meeting.get(f"answer/{question}").decode()
        meeting.set(f"heard/{name}/{rank}", "")
        return name
    name, missing = secrets.token_hex(8), set(range(1, world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if meeting.check([f"heard/{name}/{other}"]):
                missing.remove(other)
            elif meeting.check([f"question/{other}"]):
                meeting.set(f"answer/{meeting.get(f'question/{other}').decode()}", name)
        if missing and time.monotonic() > deadline:
            raise TimeoutError(
                f"Process 0 has waited {timeout.total_seconds():g} s (comm.timeout_s) for these to start: "
                f"{', '.join(map(str, sorted(missing)))} of {world_size}"
            )
        time.sleep(0.02)
    return name
