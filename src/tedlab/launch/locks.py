"""Locks on a run's directory and on its temporary folders, which the next run removes if their owner has died.

Each lock is a file that its owner keeps locked (``flock``) while it lives. The kernel releases the lock however the
owner ends, so neither a crash nor a reused process id leaves a stale lock behind.
"""

import errno
import fcntl
import os
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from tedlab.errors import DirectoryInUse

RUN_LOCK = "run.lock"
_OWNER = ".owner"  # whoever locks this file owns the scratch folder that it is in
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Lock:
    """A locked file. It stays locked until every process that has it open has closed it.

    When multiprocessing pickles a lock into a new process, that process keeps the file open, too.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self._descriptor),)

    @classmethod
    def on(cls, path: Path) -> "Lock | None":
        """Locks a file, creating it if needed. Returns None if another process holds the lock."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_ino == path.stat().st_ino:
                    return cls(descriptor)
            except FileNotFoundError:
                pass  # the owner has just removed the file, so try again with a new one
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                warnings.warn(f"{path} cannot be locked on this file system: {error.strerror}", stacklevel=3)
                return cls(descriptor)
            os.close(descriptor)

    def write(self, text: str) -> None:
        """Replaces the contents of the file."""
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def close(self) -> None:
        """Closes the file in this process."""
        os.close(self._descriptor)


def _received(duplicate: Any) -> Lock:
    return Lock(duplicate.detach())


@contextmanager
def run_directory(directory: Path, patience_s: float = 5.0) -> Iterator[Lock]:
    """Locks a run directory, creating it if needed, so that no other run writes into it.

    Args:
        directory: The run directory.
        patience_s: Seconds to wait for the last processes of a killed run to end.

    Yields:
        The lock. Pass it to every process that writes there: the directory stays locked while any of them has it.

    Raises:
        DirectoryInUse: If another run holds the lock; the message says which run, and since when.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / RUN_LOCK
    deadline = time.monotonic() + patience_s
    while (lock := Lock.on(path)) is None:
        if time.monotonic() > deadline:
            raise DirectoryInUse(
                f"{directory} is the directory of another run, {path.read_text().strip() or 'just starting'}. Two runs "
                "in one directory would write over each other: wait for it, end it, or give this one its own "
                "hydra.run.dir"
            )
        time.sleep(0.1)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    try:
        yield lock
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def is_in_use(directory: Path) -> bool:
    """Returns whether a run of this machine writes into a run directory at the moment; it changes nothing there."""
    try:
        descriptor = os.open(directory / RUN_LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a run that starts just now tries again
    except OSError as error:
        return error.errno not in _UNSUPPORTED
    finally:
        os.close(descriptor)
    return False


@contextmanager
def scratch(name: str, parent: Path | None = None) -> Iterator[Path]:
    """Creates a temporary folder ``tedlab-<name>-…``, after removing those of the same name whose owners are dead.

    Args:
        name: A word for the folder's purpose.
        parent: The folder to create it in; None means the system's folder for temporary files.
    """
    where = Path(tempfile.gettempdir()) if parent is None else parent
    for owner in where.glob(f"tedlab-{name}-*/{_OWNER}"):
        _remove_if_abandoned(owner)
    folder = Path(tempfile.mkdtemp(prefix=f"tedlab-{name}-", dir=where))
    unnamed = folder / f"{_OWNER}-new"
    lock = Lock.on(unnamed)
    assert lock is not None
    unnamed.rename(folder / _OWNER)  # renamed once locked, so that no process ever sees it unlocked
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _remove_if_abandoned(owner: Path) -> None:
    try:
        if owner.stat().st_uid != os.getuid() or (lock := Lock.on(owner)) is None:
            return
    except OSError:  # another process is removing it
        return
    shutil.rmtree(owner.parent, ignore_errors=True)
    lock.close()
