"""Runs functions as the ranks of a world, in processes forked from a server that has imported everything.

Each call gets fresh processes inside a process group (of gloo, or of NCCL with a GPU for each), with the environment
that torchrun would give them: what torch keeps of an earlier world (DTensor caches meshes, and these the threads of
their groups) cannot matter.
"""

import contextlib
import faulthandler
import gc
import multiprocessing as mp
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from tests import deaths

PRELOADED = [  # what tests import, pytest not least: each worker would take longer for that than for its work
    *("pytest", "tedlab", "tedlab.certify", "tedlab.predict.sim"),
    *("tests.pool", "tests.training", "tests.certify.runs"),
    *("tests.comm.test_ledger", "tests.moe.test_folding"),  # which compose a configuration when imported
]


class WorkerDied(AssertionError):
    """A signal ended a rank: it fell, or was brought down, outside of Python."""


class Silence(AssertionError):
    """A rank did not answer in time."""


class WorkerPool:
    """See the module. ``run`` raises AssertionError with the traceback of the rank that failed first."""

    def __init__(self, backend: str = "gloo") -> None:
        self._backend = backend
        os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers: there are more of them than cores
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """``function(*args)`` in every rank; returns their results in order of rank.

        A world of which a signal ended a rank gets a second chance, with a warning: one has died of a corrupted heap
        (torch 2.13). The cause is not known: nothing here is native code, and AddressSanitizer, valgrind and seven
        thousand more worlds like it found none. A wrong result, an exception and a hang get no second chance, and a
        pytest run in which more than one world fell fails all the same (see ``deaths``).
        """
        try:
            return self._run(world_size, function, args, timeout)
        except WorkerDied as death:
            warnings.warn(f"A world is run once more: {death}", stacklevel=2)
            return self._run(world_size, function, args, timeout)

    def run_each(
        self, world_size: int, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], timeout: float = 120
    ) -> list[list[Any]]:
        """``run`` for each of several tuples of arguments, in turn in one world, in which the first costs most."""
        by_rank = self.run(world_size, _each, function, arguments, timeout=timeout)
        return [list(results) for results in zip(*by_rank, strict=True)]

    def _run(self, world_size: int, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        task = pickle.dumps((function, args))
        with tempfile.TemporaryDirectory() as folder:
            workers = []
            for rank in range(world_size):
                ours, theirs = self._context.Pipe()
                setting = (self._backend, rank, world_size, os.path.join(folder, "store"), timeout)
                last_words = os.path.join(folder, f"last_words_{rank}")
                process = self._context.Process(target=_serve, args=(theirs, setting, task, last_words), daemon=True)
                process.start()
                theirs.close()
                workers.append((process, ours, last_words))
            try:
                answers = _collect(workers, timeout)
            finally:
                for process, *_ in workers:
                    process.kill()
                    process.join()
        # Who died takes the others' connections along: its end comes first, whenever it was noticed.
        failures = [
            (not isinstance(error, WorkerDied), when, rank, error)
            for rank, (when, error, _) in enumerate(answers)
            if error is not None
        ]
        if failures:
            *_, rank, error = min(failures)
            if isinstance(error, WorkerDied):
                deaths.record(f"rank {rank} of {world_size} in {function.__qualname__}: {error}")
            if isinstance(error, Silence):
                raise Silence("\n".join(f"rank {other} of {world_size}: {said}" for *_, other, said in failures))
            raise type(error)(f"rank {rank} of {world_size} failed:\n{error}")
        return [pickle.loads(answer) for *_, answer in answers]


def _each(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [function(*each) for each in arguments]


Answer = tuple[float, AssertionError | None, Any]  # when, what went wrong, the pickled result


def _collect(workers: list[tuple[Any, Any, str]], timeout: float) -> list[Answer]:
    answers: list[Answer] = []
    deadline = time.time() + timeout
    for process, connection, last_words in workers:
        if any(error for _, error, _ in answers):
            deadline = min(deadline, time.time() + 5)
        try:
            if connection.poll(max(0.0, deadline - time.time())):
                answers.append(connection.recv())
            else:
                answers.append((time.time(), _silence(process, last_words), None))
        except EOFError:
            answers.append((time.time(), _death(process, last_words), None))
    return answers


def _silence(process: Any, last_words: str) -> AssertionError:
    """Says where a rank is that does not answer."""
    with contextlib.suppress(ProcessLookupError):  # it left just now
        os.kill(process.pid, signal.SIGUSR1)
        process.join(1)
    with open(last_words) as file:
        return Silence(f"no answer in time; it was at\n{file.read()}")


def _death(process: Any, last_words: str) -> AssertionError:
    process.join()
    if process.exitcode >= 0:
        return AssertionError(f"left with exit code {process.exitcode}")
    with open(last_words) as file:
        return WorkerDied(f"ended by {signal.Signals(-process.exitcode).name}\n{file.read()}")


def _serve(connection: Any, setting: tuple[str, int, int, str, float], task: bytes, last_words: str) -> None:
    import torch
    import torch.distributed as dist

    words = open(last_words, "w")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.enable(words)
    faulthandler.register(signal.SIGUSR1, words)
    torch.set_num_threads(1)
    gc.freeze()  # what the server has imported is no garbage: collections need not look through it in every process
    try:
        function, args = pickle.loads(task)
        with _world(*setting):
            answer = pickle.dumps(function(*args))
            dist.barrier()  # nobody leaves while others are still connecting
        connection.send((time.time(), None, answer))
    except BaseException:
        connection.send((time.time(), AssertionError(traceback.format_exc()), None))


@contextlib.contextmanager
def _world(backend: str, rank: int, world_size: int, store: str, timeout: float) -> Any:
    import torch
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
    device = torch.device("cuda", rank) if backend == "nccl" else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
        device_id=device,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
