"""Runs functions as the ranks of a world, in processes forked from a server that has imported everything.

Each call gets fresh processes inside a gloo process group, with the environment that torchrun would give them: what
torch keeps of an earlier world (DTensor caches meshes, and these the threads of their groups) cannot matter.
"""

import contextlib
import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

PRELOADED = [  # what tests import, pytest not least: each worker would take longer for that than for its work
    *("pytest", "tedlab", "tedlab.certify", "tedlab.simulate"),
    *("tests.pool", "tests.training", "tests.certify.runs"),
]


class WorkerPool:
    """See the module. ``run`` raises AssertionError with the traceback of the rank that failed first."""

    def __init__(self) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers: there are more of them than cores
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """``function(*args)`` in every rank; returns their results in order of rank."""
        task = pickle.dumps((function, args))
        with tempfile.TemporaryDirectory() as folder:
            workers = []
            for rank in range(world_size):
                ours, theirs = self._context.Pipe()
                setting = (rank, world_size, os.path.join(folder, "store"), timeout)
                process = self._context.Process(target=_serve, args=(theirs, setting, task), daemon=True)
                process.start()
                theirs.close()
                workers.append((process, ours))
            try:
                answers = _collect(workers, timeout)
            finally:
                for process, _ in workers:
                    process.kill()
                    process.join()
        failures = [(when, rank, text) for rank, (when, ok, text) in enumerate(answers) if not ok]
        if failures:
            _, rank, text = min(failures)
            raise AssertionError(f"rank {rank} of {world_size} failed:\n{text}")
        return [pickle.loads(answer) for _, _, answer in answers]


def _collect(workers: list[tuple[Any, Any]], timeout: float) -> list[tuple[float, bool, Any]]:
    answers: list[tuple[float, bool, Any]] = []
    deadline = time.time() + timeout
    for process, connection in workers:
        if not all(ok for _, ok, _ in answers):
            deadline = min(deadline, time.time() + 5)
        try:
            hung = not connection.poll(max(0.0, deadline - time.time()))
            answers.append((time.time(), False, "no answer in time") if hung else connection.recv())
        except EOFError:
            answers.append((time.time(), False, f"died with exit code {process.exitcode}"))
    return answers


def _serve(connection: Any, setting: tuple[int, int, str, float], task: bytes) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(task)
        with _world(*setting):
            answer = pickle.dumps(function(*args))
            dist.barrier()  # nobody leaves while others are still connecting
        connection.send((time.time(), True, answer))
    except BaseException:
        connection.send((time.time(), False, traceback.format_exc()))


@contextlib.contextmanager
def _world(rank: int, world_size: int, store: str, timeout: float) -> Any:
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        GROUP_RANK="0",
        MASTER_ADDR="localhost",
        MASTER_PORT="0",
        TORCHELASTIC_RUN_ID="tests",
    )
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
