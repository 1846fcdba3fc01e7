"""Commands as a user types them, without the start of Python, which takes longer than most of them."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver, util
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig


def run_command(main: Callable[[], None], *arguments: str) -> int | str | None:
    """Runs the command in this process, and returns what it exits with: a message, a code, or None.

    Nothing of Hydra is left behind.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tedlab", *arguments])
        try:
            main()
        except SystemExit as end:
            return end.code
        finally:
            HydraConfig.instance().cfg = None
            GlobalHydra.instance().clear()
    return None


def run_forked(
    module: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float
) -> "subprocess.CompletedProcess[str]":
    """Does what ``subprocess.run([python, "-m", module, *arguments], ...)`` does, in a process of the pool's server."""
    with forked(module, arguments, folder, environment) as (process, shown):
        process.join(timeout)
        if process.exitcode is None:
            raise subprocess.TimeoutExpired([module, *arguments], timeout)
        stdout, stderr = (Path(shown, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([module, *arguments], process.exitcode, stdout, stderr)


@contextlib.contextmanager
def forked(
    module: str,
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    ignored: Sequence[signal.Signals] = (),
) -> Iterator[tuple[BaseProcess, Path]]:
    """Starts a command, and yields its process and a folder with its ``stdout`` and ``stderr``; kills it in the end.

    Where it starts, signals are ignored, as a shell may leave them.

    The pool's server has imported everything, and so have the workers that the command launches: they are forked from
    a server of the command's own, which is forked from it, so that folder and environment are theirs as well.
    """
    with tempfile.TemporaryDirectory() as shown:
        process = multiprocessing.get_context("forkserver").Process(
            target=_run_module, args=(module, [*arguments], str(folder), dict(environment), shown, ignored)
        )
        process.start()
        try:
            yield process, Path(shown)
        finally:
            process.kill()
            process.join()


def _run_module(
    module: str,
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    shown: str,
    ignored: Sequence[signal.Signals] = (),
) -> None:
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(folder)
    sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ.clear()
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        with open(Path(shown, stream.name.strip("<>")), "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(util, "spawnv_passfds", _fork_instead)
        forkserver._forkserver.set_forkserver_preload([])
        forkserver.ensure_running()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _fork_instead(path: str, arguments: Sequence[str], descriptors: Sequence[int]) -> int:
    """Forks a server that ``python -c <the last argument>`` would start, with no more open files than that one has."""
    pid = os.fork()
    if pid == 0:
        try:
            kept = {0, 1, 2, *descriptors}
            for descriptor in {int(name) for name in os.listdir("/proc/self/fd")} - kept:
                with contextlib.suppress(OSError):  # that of the list itself
                    os.close(descriptor)
            exec(arguments[-1], {})
        finally:
            os._exit(0)
    return pid
