"""Records why a process is about to end, in a folder that its launcher reads, or on stderr."""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

_FOLDER = "TEDLAB_FAILURES"  # the environment variable in which our launcher passes the folder to its workers
_SUFFIX = ".failure"


def keep_in(folder: Path) -> None:
    """Makes this process and its children record failures in the folder."""
    os.environ[_FOLDER] = str(folder)


def record(cause: str) -> None:
    """Records why this process is about to end; on stderr if there is no folder or it cannot be written to."""
    folder = os.environ.get(_FOLDER)
    if folder is not None:
        # torch's own record has whole seconds, which do not tell who failed first from who merely lost its peer.
        with suppress(OSError):
            Path(folder, f"{time.time_ns()}_{os.environ['RANK']}{_SUFFIX}").write_text(cause)
            return
    print(cause, file=sys.stderr, flush=True)


def recorded(folder: Path) -> list[Path]:
    """Returns the files of recorded failures in the folder, the earliest first."""
    return sorted(folder.glob(f"*{_SUFFIX}"))


def rank_of(failure: Path) -> int:
    """Returns the rank of the process that recorded a failure."""
    return int(failure.stem.split("_")[1])
