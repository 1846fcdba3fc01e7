"""Records why a process is about to end, in a folder that its launcher reads, or on stderr."""

import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from hydra.errors import CompactHydraException

FULL = "HYDRA_FULL_ERROR"  # the environment variable by which Hydra's users ask for tracebacks
_FOLDER = "TEDLAB_FAILURES"  # the environment variable in which our launcher passes the folder to its workers
_SUFFIX, _TRACE = ".failure", ".traceback"


def keep_in(folder: Path) -> None:
    """Makes this process and its children record failures in the folder."""
    os.environ[_FOLDER] = str(folder)


def sentence(error: BaseException) -> str | None:
    """Returns what an error says to users; None for one that only a traceback explains, such as a mistake in code.

    Users understand tedlab's own errors, those of the operating system, such as a full disk, and those of W&B.
    """
    if isinstance(error, CompactHydraException | OSError):
        return str(error) or type(error).__name__
    if type(error).__module__.partition(".")[0] == "wandb":
        return f"W&B: {error}"
    return None


def record_error(error: BaseException) -> None:
    """Records the error that ends this process: what it says to users and its traceback, or that alone."""
    said, trace = sentence(error), "".join(traceback.format_exception(error))
    if said is None or os.environ.get(FULL):
        record(trace)
    else:
        record(said, trace)


def record(cause: str, trace: str | None = None) -> None:
    """Records why this process is about to end; on stderr if there is no folder or it cannot be written to.

    Args:
        cause: What is shown.
        trace: The traceback that belongs to it, for a file.
    """
    folder = os.environ.get(_FOLDER)
    if folder is not None:
        # torch's own record has whole seconds, which do not tell who failed first from who merely lost its peer.
        with suppress(OSError):
            file = Path(folder, f"{time.time_ns()}_{os.environ['RANK']}{_SUFFIX}")
            if trace is not None:
                file.with_suffix(_TRACE).write_text(trace)
            file.write_text(cause)
            return
    print(cause, file=sys.stderr, flush=True)


def recorded(folder: Path) -> list[Path]:
    """Returns the files of recorded failures in the folder, the earliest first."""
    return sorted(folder.glob(f"*{_SUFFIX}"))


def trace_of(failure: Path) -> str | None:
    """Returns the traceback that a recorded failure does not show, if there is one."""
    file = failure.with_suffix(_TRACE)
    return file.read_text() if file.exists() else None


def rank_of(failure: Path) -> int:
    """Returns the rank of the process that recorded a failure."""
    return int(failure.stem.split("_")[1])
