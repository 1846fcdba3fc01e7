"""Makes files survive a crash of the machine: writes them, syncs them to the disk and renames them into place."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Writes a file and returns once it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Returns once the names in a directory are on the disk; does not sync the files themselves."""
    with _opened(path) as descriptor:
        os.fsync(descriptor)


def partial(path: Path) -> Path:
    """Returns where the future content of ``path`` is written."""
    return path.with_name(path.name + ".partial")


def replaced(path: Path) -> Path:
    """Returns where the old content of ``path`` is between the two renames of :func:`put`."""
    return path.with_name(path.name + ".old")


def put(new: Path, path: Path) -> None:
    """Moves a directory or a link, complete and synced, to ``path``, replacing whatever is there.

    A link replaces a link atomically. Otherwise the old content stays at ``replaced(path)`` until the new name is on
    the disk, and is deleted then.
    """
    old = replaced(path)
    if (path.is_symlink() or path.exists()) and not (path.is_symlink() and new.is_symlink()):
        discard(old)
        path.rename(old)
    new.rename(path)
    sync_directory(path.parent)
    discard(old)


def discard(path: Path) -> None:
    """Deletes a directory or a link, if it exists."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yields an empty directory that is at ``path`` once the context is left, which must not exist, and not before.

    If an exception leaves the context, nothing is left of it.

    Raises:
        FileExistsError: If a process that was killed left one.
    """
    new = partial(path)
    if new.exists():
        raise FileExistsError(f"{new} exists, as what is not finished is called: delete it if nothing writes there")
    new.mkdir(parents=True)
    try:
        yield new
        sync_directory(new)
        put(new, path)
    finally:
        discard(new)


@contextmanager
def held(directory: Path) -> Iterator[bool]:
    """Locks a directory while the context is open, at most for the life of the process. Yields whether it could.

    It yields False if another process holds the lock, or if the file system cannot lock a directory (some NFS).
    """
    with _opened(directory) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave the lock to forked children


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
