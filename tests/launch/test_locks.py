"""A run directory is one run's at a time, and what a dead process leaves in temporary folders goes with the next."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tedlab.errors import DirectoryInUse
from tedlab.launch.locks import RUN_LOCK, Lock, run_directory, scratch
from tests.pool import WorkerPool


@pytest.fixture
def start(pool: WorkerPool) -> Iterator[Any]:
    """Starts a function in a process forked from the pool's server and waits for its first word."""
    context = multiprocessing.get_context("forkserver")
    started = []

    def start(function: Any, *args: Any) -> Any:
        ours, theirs = context.Pipe()
        process = context.Process(target=function, args=(theirs, *args))
        process.start()
        started.append(process)
        assert ours.poll(30)
        ours.recv()
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def hold(connection: Any, directory: Path) -> None:
    with run_directory(directory):
        connection.send(None)
        time.sleep(60)


def live_with(connection: Any, lock: Lock) -> None:
    connection.send(None)
    time.sleep(60)


def keep_scratch(connection: Any, parent: Path) -> None:
    with scratch("test", parent) as folder:
        (folder / "file").write_text("half")
        connection.send(None)
        time.sleep(60)


def test_a_second_run_in_a_directory_is_refused_until_the_first_is_dead(start: Any, tmp_path: Path) -> None:
    first = start(hold, tmp_path)
    named = rf"another run, process {first.pid} on .*, since 20.*hydra.run.dir"
    with pytest.raises(DirectoryInUse, match=named), run_directory(tmp_path, patience_s=0.2):
        pytest.fail("two runs in one directory")
    with run_directory(tmp_path / "other"):
        pass
    os.kill(first.pid, signal.SIGKILL)
    with run_directory(tmp_path):
        assert (tmp_path / RUN_LOCK).read_text().startswith(f"process {os.getpid()} ")
    assert not (tmp_path / RUN_LOCK).exists()


def test_a_directory_is_held_as_long_as_any_process_of_its_run_lives(start: Any, tmp_path: Path) -> None:
    """A launcher that is killed leaves workers behind, which write until they notice."""
    lock = Lock.on(tmp_path / RUN_LOCK)
    assert lock is not None
    worker = start(live_with, lock)
    lock.close()
    with pytest.raises(DirectoryInUse), run_directory(tmp_path, patience_s=0.2):
        pytest.fail("the worker still writes")
    os.kill(worker.pid, signal.SIGKILL)
    with run_directory(tmp_path):
        pass


def test_scratch_folders_of_the_dead_are_removed_and_no_others(start: Any, tmp_path: Path) -> None:
    dead, living = start(keep_scratch, tmp_path), start(keep_scratch, tmp_path)
    os.kill(dead.pid, signal.SIGKILL)
    dead.join()
    strangers = [tmp_path / "tedlab-test-of-a-stranger", tmp_path / "tedlab-other-kind"]
    for folder in strangers:
        folder.mkdir()
    assert len(list(tmp_path.glob("tedlab-test-*/file"))) == 2
    with scratch("test", tmp_path) as ours:
        assert len(list(tmp_path.glob("tedlab-test-*/file"))) == 1
        assert living.is_alive()
    assert not ours.exists()
    assert all(folder.exists() for folder in strangers)
