"""Where processes that torchrun has started again find each other, and not what is left of those before them.

torchrun may keep one store over all its attempts (torch 2.13 does for its c10d and its static rendezvous), and torch
looks in it under the names of the attempt before: a process connects to the address of one that is dead. torchrun's
count of restarts does not tell attempts apart, since each node counts its own.
"""

import os
import secrets
import time
from datetime import timedelta

from torch import distributed as dist


def store(rank: int, world_size: int, timeout: timedelta) -> dist.Store | None:
    """A store that only the processes of this attempt know; None where torch's own way is right.

    Args:
        rank: of this process.
        world_size: how many there are.
        timeout: for the others to come.

    Raises:
        TimeoutError: if some did not; in the first process, which names them.
        torch.distributed.DistNetworkError: if the store cannot be reached.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    agent = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, timeout=timeout)
    meeting = dist.PrefixStore("tedlab/rendezvous", agent)
    return dist.PrefixStore(f"tedlab/{_attempt(meeting, rank, world_size, timeout)}", agent)


def _attempt(meeting: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that the first process has thought of and all others of this attempt have heard from it.

    Each asks under a number that it has drawn itself, so that an answer from before cannot be one to it; the first
    answers, until all have said that they have heard, whatever questions it may still find of processes that are gone.
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
