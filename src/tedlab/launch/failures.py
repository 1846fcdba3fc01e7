"""How a process that is about to end leaves word of why: in a folder of its launcher's, or on stderr."""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

_FOLDER = "TEDLAB_FAILURES"  # the environment variable by which a launcher of ours names the folder to its workers
_SUFFIX = ".failure"


def keep_in(folder: Path) -> None:
    """Lets this process leave word in the folder."""
    os.environ[_FOLDER] = str(folder)


def record(cause: str) -> None:
    """Says why this process is about to end: on stderr also if the folder is gone or its disk full."""
    folder = os.environ.get(_FOLDER)
    if folder is not None:
        # torch's own record counts whole seconds: who failed first, and who merely lost its peer, is then a guess.
        with suppress(OSError):
            Path(folder, f"{time.time_ns()}_{os.environ['RANK']}{_SUFFIX}").write_text(cause)
            return
    print(cause, file=sys.stderr, flush=True)


def recorded(folder: Path) -> list[Path]:
    """What was left in the folder, by time."""
    return sorted(folder.glob(f"*{_SUFFIX}"))


def rank_of(failure: Path) -> int:
    """The process that left it."""
    return int(failure.stem.split("_")[1])
