"""Starts the processes of a run on this machine and brings back the first one's result.

The process that Hydra runs in only composes; every run gets fresh workers, so that the jobs of a sweep share neither
process group nor environment. Workers are forked from a server process that has imported everything and done nothing:
four of them start in the time of one import, and those of a sweep's next job at once. Under torchrun, or srun with
several tasks, the processes exist already and the run takes place in them.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tedlab._compat.python import run_exit_functions
from tedlab.errors import WorkerFailed
from tedlab.interrupts import fork_server
from tedlab.launch import failures, outside
from tedlab.launch.locks import Lock, scratch
from tedlab.launch.outside import started_outside

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_GRACE_S = 10  # from the failure of one process to the end of those that do not end when asked
_LEAVE_S = 20  # from the end of the first process's work to that of the others
_LOOK_S = 2  # between looks at whether the launching process exists
LOG = "failure.log"  # the traceback of a failure that is shown as a sentence
_DONE = "done"  # a file in the folder that launcher and workers share, once the first process's work is complete
_WORKER = ".worker"  # a file in that folder, PID_RANK.worker, for each that is at work
_COMPLETE = ".complete"  # what it is renamed to when the work is complete
_OF_TERMINALS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_HANDLED = (signal.SIGTERM, *_OF_TERMINALS)


class Job(Protocol):
    """What a run is told."""

    @property
    def output_dir(self) -> str:
        """Where its files go."""


Task = Callable[[Any], dict[str, Any]]


def leave_if_started_outside() -> None:
    """Ends a process of torchrun or srun whose work is done, without the interpreter's own clean-up.

    A thread of gloo may be about to drop the last reference to a tensor just then. It asks for the interpreter's lock,
    gets none any more, and aborts the process (torch 2.13; in one of ten runs of two small processes).
    """
    if started_outside():
        run_exit_functions()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def launch(
    run: Task, config: Job, processes: int, lock: Lock | None = None, log_in: Path | None = None
) -> dict[str, Any]:
    """Calls ``run(config)`` in ``processes`` new processes of this machine and returns what the first one returned.

    Args:
        run: an importable function; its module must not be ``__main__``.
        config: handed to every process.
        processes: how many, one included. If they exist already, ``run`` is called right here.
        lock: held by every process while it lives.
        log_in: the folder for :data:`LOG`; None: where the job's files go.

    Raises:
        WrongEnvironment: if the environment looks as if they existed already, and they do not.
        WorkerFailed: if a process failed. The others were ended.
        SystemExit: if this process received a signal; the workers were ended.
    """
    outside.check()
    if started_outside():
        return run(config)
    # Commands import this module to compose and to print their help, for which torch would take too long.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What terminals send may stay ignored: Ctrl-C in a script's background, and their end for nohup. A scheduler's
    # SIGTERM may not, not even below a batch script that ignores it for itself.
    ignored = [number for number in _OF_TERMINALS if signal.getsignal(number) == signal.SIG_IGN]
    heard = [number for number in _HANDLED if number not in ignored]
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.5,
        start_method="forkserver",
        signals_to_handle=",".join(number.name for number in heard),
    )
    multiprocessing.set_start_method("forkserver", force=True)  # joblib's own, which children inherit, has no server
    fork_server([run.__module__])
    threads = max(1, (os.cpu_count() or 1) // processes)
    # torch's launcher logs each worker's end with a traceback of its own; ours is shown once, below.
    for name in (
        "torch.distributed.elastic",
        "torch.distributed.elastic.agent.server.api",
        "torch.multiprocessing.spawn",
    ):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    with scratch("failures") as folder:
        guard = _Guard(folder)
        try:
            with guard:
                start = elastic_launch(launch_config, _worker)
                return start(run, config, threads, signal.SIGINT in heard, os.getpid(), str(folder), lock)[0]
        except ChildFailedError as error:
            rank, cause, trace = _first_failure(error, guard, folder)
            if trace is not None:
                kept = _kept(trace, log_in or Path(config.output_dir))
                raise WorkerFailed(f"{cause} (process {rank} of {processes}; {kept})") from None
            raise WorkerFailed(f"process {rank} of {processes} failed; all were ended.\n\n{cause}") from None
        except SignalException as error:  # derives from Exception: Hydra would go on with the next job of a sweep
            print(f"\n{error.sigval.name}: all processes were ended.{_where_to_resume(config)}", file=sys.stderr)
            raise SystemExit(128 + error.sigval) from None
        finally:
            for number, handler in handlers.items():  # the elastic launcher leaves its own behind
                signal.signal(number, handler)
            os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)  # and this


def _worker(
    run: Task, config: Job, threads: int, hears_ctrl_c: bool, launcher: int, folder: str, lock: Lock | None
) -> dict[str, Any]:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # where it was ignored, it is in the server that forks, too
    # By an exception, a run tells why it ended.
    signal.signal(signal.SIGINT, signal.default_int_handler if hears_ctrl_c else signal.SIG_IGN)
    rank = os.environ["RANK"]
    at_work = Path(folder, f"{os.getpid()}_{rank}{_WORKER}")
    at_work.touch()
    failures.keep_in(Path(folder))
    threading.Thread(target=_end_with, args=(launcher, Path(folder)), daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        result = run(config)
    except BaseException as error:
        failures.record_error(error)
        if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and not error.code):
            sys.exit(1)  # torch's launcher waits for ever for the result of one that leaves with exit code 0
        raise
    with contextlib.suppress(OSError):  # no reason to fail now: temporary files may have been cleaned meanwhile
        if rank == "0":
            Path(folder, _DONE).touch()
        at_work.rename(at_work.with_suffix(_COMPLETE))  # it only waits for the launcher to take its result
    return result


def _first_failure(error: "ChildFailedError", guard: "_Guard", folder: Path) -> tuple[int, str, str | None]:
    """The process that failed of itself, why, and the traceback if that is not why.

    The others lost their peer or were ended by the launcher, be it with SIGTERM by torch's or by the guard of ours.
    """
    rank, failure = error.get_first_failure()
    ended = failure.pid in guard.ended
    if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM and not ended:
        return rank, f"It was ended by {failure.signal_name()} (out of memory?) and left no traceback.", None
    causes = failures.recorded(folder)
    if causes:
        return failures.rank_of(causes[0]), causes[0].read_text(), failures.trace_of(causes[0])
    if ended and guard.blamed is not None:
        return *guard.blamed, None
    return rank, f"It ended with exit code {failure.exitcode} and left no traceback.", None


def _kept(trace: str, folder: Path) -> str:
    """Writes a traceback into a folder if it can be, and says where it is to be found."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG).write_text(trace)
        return f"its traceback: {folder / LOG}"
    except OSError:
        return f"{failures.FULL}=1 shows its traceback"


def _where_to_resume(config: Job) -> str:
    last = Path(config.output_dir, "checkpoints", "last.ckpt")
    return f" To go on from the last checkpoint: ckpt_path={last}" if last.exists() else ""


class _Guard(threading.Thread):
    """Ends all workers some seconds after one has failed or is gone, or the first is done. A thread of the launcher.

    torch's launcher asks the peers of a failed process to end, which one that hangs, is stopped or waits for NCCL
    cannot hear, and insists only after 30 seconds. It does not see one that leaves with exit code 0 before its work is
    complete.

    Attributes:
        ended: the process ids of the workers that it has ended.
        blamed: the rank of the one because of which it did so, and what to tell if no cause is recorded.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.ended: set[int] = set()
        self.blamed: tuple[int, str] | None = None
        self._folder = folder
        self._over = threading.Event()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Looks every second until it has ended the workers or the launch is over."""
        gone, missed = None, float("inf")  # the first that is gone, be it without a record, and since when
        while not self._over.wait(1):
            with contextlib.suppress(FileNotFoundError):  # temporary files may be cleaned while it looks
                if gone is None and (gone := _gone(self._folder)) is not None:
                    missed = time.monotonic()
                late = _late(self._folder)
                if (
                    late is not None
                    or time.monotonic() - missed > _GRACE_S
                    or any(_age_s(failure) > _GRACE_S for failure in failures.recorded(self._folder))
                ):
                    if gone is not None:
                        self.blamed = gone, "It was gone before its work was complete, and left no traceback."
                    elif late is not None:
                        self.blamed = late, f"It did not end within {_LEAVE_S} s of process 0, whose work was complete."
                    self.ended = _kill_workers(self._folder)
                    return


def _age_s(file: Path) -> float:
    return time.time() - file.stat().st_mtime


def _end_with(launcher: int, folder: Path) -> None:
    """Ends this process and its peers, who may be stopped, when the launching one is gone: killed, it cannot do so."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A pipe tells at once, unless a process that the launcher has forked holds its end.
    while parent.is_alive() and _exists(launcher):
        parent.join(_LOOK_S)
    _kill_workers(folder)
    os.kill(os.getpid(), signal.SIGKILL)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):  # the latter if another user's process has the id by now
        return False
    return True


def _id_and_rank(worker: Path) -> tuple[int, int]:
    process, rank = worker.stem.split("_")
    return int(process), int(rank)


def _gone(folder: Path) -> int | None:
    """The rank of a worker that is gone and whose work is not complete."""
    for file in folder.glob(f"*{_WORKER}"):
        process, rank = _id_and_rank(file)
        if not _exists(process) and file.exists():  # else it has just completed its work
            return rank
    return None


def _late(folder: Path) -> int | None:
    """The rank of a worker that is still at work when it should have ended after the first."""
    done = folder / _DONE
    if not done.exists() or _age_s(done) <= _LEAVE_S:
        return None
    return min((_id_and_rank(file)[1] for file in folder.glob(f"*{_WORKER}")), default=None)


def _kill_workers(folder: Path) -> set[int]:
    """Ends all workers and returns the process ids of those that there were.

    Those whose work is complete, too: if the others have left with exit code 0, torch's launcher would wait for ever.
    """
    workers = {_id_and_rank(file)[0] for state in (_WORKER, _COMPLETE) for file in folder.glob(f"*{state}")}
    ended = set()
    for worker in sorted(workers, key=lambda process: process == os.getpid()):  # itself last
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(worker, signal.SIGKILL)
            ended.add(worker)
    return ended
