"""Eight worker processes that live as long as the test session and run functions as the ranks of a world.

A function is handed to the first ``world_size`` workers; each runs it inside a fresh gloo process group with the
environment that torchrun would give it. Starting a world thus costs milliseconds, not imports.
"""

import contextlib
import gc
import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

WORKERS = 8


class WorkerPool:
    """See the module. ``run`` raises AssertionError with the traceback of the rank that failed first."""

    def __init__(self) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers: there are more of them than cores
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["tedlab", "tedlab.module", "tests.pool"])
        self._workers: list[tuple[Any, Any]] = []

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """``function(*args)`` in every rank; returns their results in order of rank."""
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._workers.append((process, ours))
        with tempfile.TemporaryDirectory() as folder:
            task = pickle.dumps((function, args))
            for rank in range(world_size):
                self._workers[rank][1].send((rank, world_size, os.path.join(folder, "store"), timeout, task))
            answers = self._collect(world_size, timeout)
        failures = [(when, rank, text) for rank, (when, ok, text) in answers.items() if not ok]
        if failures:
            self.close()  # a broken world leaves no usable workers behind
            _, rank, text = min(failures)
            raise AssertionError(f"rank {rank} of {world_size} failed:\n{text}")
        return [pickle.loads(answers[rank][2]) for rank in range(world_size)]

    def _collect(self, world_size: int, timeout: float) -> dict[int, tuple[float, bool, Any]]:
        answers: dict[int, tuple[float, bool, Any]] = {}
        deadline = time.time() + timeout
        for rank in range(world_size):
            process, connection = self._workers[rank]
            if any(not ok for _, ok, _ in answers.values()):
                deadline = min(deadline, time.time() + 5)
            try:
                hung = not connection.poll(max(0.0, deadline - time.time()))
                answers[rank] = (time.time(), False, "no answer in time") if hung else connection.recv()
            except EOFError:
                answers[rank] = (time.time(), False, f"died with exit code {process.exitcode}")
        return answers

    def close(self) -> None:
        """Ends all workers."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()


def _serve(connection: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays; collecting the rest is then quick
    while True:
        try:
            rank, world_size, store, timeout, task = connection.recv()
        except EOFError:
            return
        try:
            function, args = pickle.loads(task)
            with _world(rank, world_size, store, timeout):
                answer = pickle.dumps(function(*args))
                dist.barrier()  # nobody leaves while others are still connecting
            gc.collect()  # process groups that a cycle keeps alive would keep their threads
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
