"""Failed jobs of a sweep: each is told in full when it fails, and all of them again, a line each, at the end."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode

_LINE = 300  # characters of a failure in the closing list


class SweepFailures:
    """What went wrong in the jobs of a sweep that run in this process; Hydra itself would tell the first one only."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    @contextmanager
    def told(self) -> Iterator[None]:
        """Around one job. Outside of a sweep this does nothing.

        Raises:
            CompactHydraException: in place of what a job raises, or in place of an exit that is not a signal's; by it
                Hydra knows that the job failed, goes on with the next, and ends with an exit code of 1.
        """
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            yield
            return
        try:
            yield
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and not isinstance(error.code, str) and error.code != 1:
                raise
            job = HydraConfig.get().job
            name = f"job {job.num} ({' '.join(HydraConfig.get().overrides.task)})"
            text = _text(error)
            print(f"\n{name} failed:\n{text}", file=sys.stderr, flush=True)
            first, *others = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
            cause = f"{first} … {others[-1]}" if others else first
            self._lines.append(f"{name}: {cause[:_LINE]}")
            raise CompactHydraException(self._lines[-1]) from None

    def list_all(self) -> None:
        """Prints a line for each."""
        if self._lines:
            print(f"\nFailed jobs of this sweep: {len(self._lines)}", *self._lines, sep="\n  ", file=sys.stderr)


def _text(error: BaseException) -> str:
    if isinstance(error, CompactHydraException):
        return str(error)
    if isinstance(error, SystemExit):
        return str(error.code) if isinstance(error.code, str) else f"It ended with exit code {error.code}."
    return "".join(traceback.format_exception(error))
