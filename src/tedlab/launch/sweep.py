"""Reports the failed jobs of a sweep: each in full when it fails, and all of them at the end with a line each."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode

from tedlab.launch.failures import FULL, sentence
from tedlab.launch.outside import started_outside

_LINE = 300  # the most characters of a failure in the closing list


class SweepFailures:
    """Collects the failures of a sweep's jobs in this process; Hydra itself would report only the first."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    @contextmanager
    def told(self) -> Iterator[None]:
        """Runs one job and reports its failure.

        Outside of a sweep, an error with a message for the user is that message and exit code 1, without the lines that
        Hydra puts around it, unless ``HYDRA_FULL_ERROR`` is set. Errors that are not tedlab's say so, and in processes
        that torchrun or srun has started they keep their traceback.

        Raises:
            CompactHydraException: In a sweep. Replaces the job's exception, or its exit with a message or code 1. It
                tells Hydra that the job failed, so that Hydra continues with the next one and ends with exit code 1.
        """
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            try:
                yield
            except Exception as error:
                said, ours = sentence(error), isinstance(error, CompactHydraException)
                # Where torchrun or srun has started this process, no launcher of ours keeps a traceback in a file.
                if said is None or os.environ.get(FULL) or (started_outside() and not ours):
                    raise
                print(said if ours else f"{said} ({FULL}=1 shows its traceback)", file=sys.stderr, flush=True)
                sys.exit(1)
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
        """Prints one line for each failed job."""
        if self._lines:
            print(f"\nFailed jobs of this sweep: {len(self._lines)}", *self._lines, sep="\n  ", file=sys.stderr)


def _text(error: BaseException) -> str:
    said = sentence(error)
    if said is not None:
        return said
    if isinstance(error, SystemExit):
        return str(error.code) if isinstance(error.code, str) else f"It ended with exit code {error.code}."
    return "".join(traceback.format_exception(error))
