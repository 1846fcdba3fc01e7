"""How a run ended: the state that its summary and W&B keep, and the summary of a run that did not finish."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tedlab.history import read_history

SUMMARY, METRICS = "summary.json", "metrics.csv"
FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"
SIGTERM = signal.SIGTERM.name  # the reason of a run that a scheduler ended
PRUNED = "pruned"  # a search stopped it, since others had come further by then
_SWALLOWED_S = 5.0  # until an exception counts as swallowed
_KEPT = ("train/", "val/", "perf/", "router/")  # metrics whose last logged value describes the whole run


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: ``finished``, ``failed`` or ``interrupted``.
        reason: One line for people.
    """

    state: str
    reason: str

    @classmethod
    def of(cls, error: BaseException) -> "Outcome":
        """Returns the outcome of a run that ``error`` ended."""
        if isinstance(error, Signalled):
            return cls(INTERRUPTED, signal.Signals(error.signal).name)
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            return cls(INTERRUPTED, "SIGINT")  # Lightning turns it into a SystemExit
        lines = str(error).strip().splitlines()
        return cls(FAILED, f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


class Signalled(SystemExit):
    """Raised when a signal asks the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = number


@contextmanager
def signals_raised(first: Callable[[Outcome], object]) -> Iterator[Callable[[], None]]:
    """Raises :class:`Signalled` on SIGTERM, which would otherwise end the process silently.

    Python only prints an exception that a signal raises within the callback of a weak reference, or ``__del__``. So it
    is raised again, after some seconds, until the caller says that it has arrived. Other signals are ignored from the
    first one on.

    Args:
        first: Called in the signal handler before it raises, since SIGKILL may follow before the stack unwinds.

    Yields:
        What to call when the exception has arrived.
    """
    arrived = threading.Event()
    main = threading.main_thread()
    if threading.current_thread() is not main:
        yield arrived.set
        return

    numbers = (signal.SIGTERM, signal.SIGINT)
    again = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        error = Signalled(number)

        def later(*_: object) -> None:
            if again.is_set():
                again.clear()
                raise error

        def remind() -> None:
            while not arrived.wait(_SWALLOWED_S):
                again.set()
                signal.pthread_kill(main.ident or 0, number)

        for other in numbers:
            signal.signal(other, later)
        threading.Thread(target=remind, daemon=True).start()
        first(Outcome.of(error))
        raise error

    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGTERM, end)
    try:
        yield arrived.set
    finally:
        arrived.set()
        for number, handler in before.items():
            if handler is not None:  # None stands for a handler that was not installed from Python
                signal.signal(number, handler)


def read_summary(directory: Path) -> dict[str, Any]:
    """Returns the contents of ``summary.json``; an empty dictionary if the file is missing or incomplete."""
    with suppress(OSError, ValueError, RecursionError):
        summary = json.loads((directory / SUMMARY).read_text())
        return summary if isinstance(summary, dict) else {}
    return {}


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    """Replaces ``summary.json`` atomically."""
    partial = directory / f"{SUMMARY}.partial"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, directory / SUMMARY)


def last_logged(directory: Path) -> dict[str, Any]:
    """Returns what ``metrics.csv`` says of a run that has no summary: the last value of each metric, and ``steps``."""
    rows = read_history(directory / METRICS)
    last = {name: float(value) for row in rows for name, value in row.items() if name.startswith(_KEPT)}
    return {**last, "steps": max((int(row["step"]) for row in rows), default=0), "output_dir": str(directory)}


def write_unfinished(directory: Path, outcome: Outcome, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes the summary of a run that ended early: its state, and the last value of each metric.

    If another process of this run has already written a summary, only its state and reason are replaced, and ``known``.

    Args:
        directory: The run directory.
        outcome: How the run ended.
        known: Further entries; ``steps`` defaults to the largest step in ``metrics.csv``.

    Returns:
        The summary.
    """
    summary = {**last_logged(directory), **read_summary(directory), **(known or {})}
    summary |= {"state": outcome.state, "reason": outcome.reason}
    write_summary(directory, summary)
    return summary
