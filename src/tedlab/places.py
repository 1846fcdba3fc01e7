"""Tells whether a file or folder can be made at a place, before anything is computed for it."""

import os
from pathlib import Path
from tempfile import TemporaryFile


def obstacle(path: Path) -> str | None:
    """Returns what is in the way of making ``path`` and the folders above it, or None if it can be made."""
    above = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not above.is_dir():
        return f"{above} is not a folder"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"this user may not write to {above}"
    try:
        with TemporaryFile(dir=above) as file:
            file.write(b"x")
    except OSError as error:
        return f"{above} takes no files ({error.strerror})"
    return None


def check_free(out: Path, what: str) -> None:
    """Refuses a place for a new folder that is taken or cannot be made.

    Args:
        out: The place, ``out`` on the command line.
        what: What is to be there, for the message.

    Raises:
        FileExistsError: If something is there.
        ValueError: If no folder can be made there; the message says what is in the way.
    """
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists; {what} goes into a folder of its own")
    found = obstacle(out)
    if found is not None:
        raise ValueError(f"out={out} cannot be made: {found}")
