"""What belongs to a living run: its directory, and its temporary folders, which the next run removes if it cannot.

Both are a file that is locked (``flock``) for as long as its owner lives. The kernel unlocks it when the owner ends,
however it ends, so that neither a process number that is used again nor a crash can deceive.
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
_OWNER = ".owner"  # in a scratch folder: who locks it owns the folder
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Lock:
    """A file that is locked. It stays locked until no process has it open any more.

    Pickled into a process that multiprocessing starts, it keeps the file open there, too.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self._descriptor),)

    @classmethod
    def on(cls, path: Path) -> "Lock | None":
        """Locks a file, which is made if need be; None if another process holds it."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_ino == path.stat().st_ino:
                    return cls(descriptor)
            except FileNotFoundError:
                pass  # its owner has just removed it: a new one
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
        """Replaces what is in the file."""
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def close(self) -> None:
        """Lets go of it in this process."""
        os.close(self._descriptor)


def _received(duplicate: Any) -> Lock:
    return Lock(duplicate.detach())


@contextmanager
def run_directory(directory: Path, patience_s: float = 5.0) -> Iterator[Lock]:
    """Holds a run directory, which is made if need be: no other run writes into it meanwhile.

    Args:
        directory: of the run.
        patience_s: how long to wait for the last processes of a run that was killed to end.

    Yields:
        The lock. The directory stays held while any process has it: hand it to all that write there.

    Raises:
        DirectoryInUse: if another run holds it; says which, and since when.
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


@contextmanager
def scratch(name: str, parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder ``tedlab-<name>-…``. Those of the same name whose owners are dead are removed first.

    Args:
        name: what for.
        parent: where; None: the system's folder for temporary files.
    """
    where = Path(tempfile.gettempdir()) if parent is None else parent
    for owner in where.glob(f"tedlab-{name}-*/{_OWNER}"):
        _remove_if_abandoned(owner)
    folder = Path(tempfile.mkdtemp(prefix=f"tedlab-{name}-", dir=where))
    unnamed = folder / f"{_OWNER}-new"
    lock = Lock.on(unnamed)
    assert lock is not None
    unnamed.rename(folder / _OWNER)  # nobody ever sees it unlocked
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
