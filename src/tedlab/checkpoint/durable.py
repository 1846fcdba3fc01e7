"""Files that survive a crash of the machine: written, synced to the disk, and put in place by a rename."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Writes a file; returns when it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Returns when the names in a directory are on the disk; the files themselves are not looked at."""
    with _opened(path) as descriptor:
        os.fsync(descriptor)


def partial(path: Path) -> Path:
    """Where what is to become ``path`` is written."""
    return path.with_name(path.name + ".partial")


def replaced(path: Path) -> Path:
    """Where what was at ``path`` is, in the moment between two renames."""
    return path.with_name(path.name + ".old")


def put(new: Path, path: Path) -> None:
    """Moves a directory or a link, complete and synced, to ``path``, whatever is there.

    A link takes the place of a link at once. Otherwise what was there is at ``replaced(path)`` for a moment, and it is
    deleted only when the new one's name is on the disk.
    """
    old = replaced(path)
    if (path.is_symlink() or path.exists()) and not (path.is_symlink() and new.is_symlink()):
        discard(old)
        path.rename(old)
    new.rename(path)
    sync_directory(path.parent)
    discard(old)


def discard(path: Path) -> None:
    """Deletes a directory or a link, if it is there."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def held(directory: Path) -> Iterator[bool]:
    """Marks a directory as in use, as long as this process lives; False if another one holds it.

    Also False on file systems that cannot lock a directory (some NFS).
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
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would leave it to children forked meanwhile


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
