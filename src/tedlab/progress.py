"""Shows how far a command has come: a bar on a terminal, and a line now and then where there is none."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typing_extensions import override

from tedlab.console import animated, errors

_FIRST_S = 5.0  # what is done by then needs no line
_LONGEST_S = 60.0  # time without one; it doubles from line to line until then
_REFRESH_S = 0.1  # what advances more often is told so often


Advance = Callable[[float], object]  # takes how much more is done


class CommandProgress(Progress):
    """One bar with the time that is left, on stderr, which disappears at the end.

    Args:
        counted: Whether to show how many of how many are done; otherwise a percentage.
        disable: Whether to show nothing, as in all processes but the first.
    """

    def __init__(self, counted: bool = True, disable: bool = False) -> None:
        console = errors()
        count = MofNCompleteColumn() if counted else TaskProgressColumn()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), count, TimeElapsedColumn())
        self._lines = not disable and not animated(console)
        self._said, self._pause = time.monotonic(), _FIRST_S
        super().__init__(
            *columns,
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=disable or self._lines,
        )

    @override
    def update(self, task_id: TaskID, *arguments: Any, **fields: Any) -> None:
        super().update(task_id, *arguments, **fields)
        if self._lines and time.monotonic() - self._said >= self._pause:
            self._said, self._pause = time.monotonic(), min(2 * self._pause, _LONGEST_S)
            (task,) = (task for task in self.tasks if task.id == task_id)
            left = "" if task.time_remaining is None else f"  ETA {timedelta(seconds=round(task.time_remaining))}"
            print(f"{task.description}  {task.percentage:.0f}%{left}", file=sys.stderr, flush=True)


@contextmanager
def advancing(description: str, total: float, disable: bool = False) -> Iterator[Advance]:
    """Yields a function that takes how much more is done, however often that is, and shows how far it has come.

    Args:
        description: What is done.
        total: How much there is to do, in any unit.
        disable: See :class:`CommandProgress`.
    """
    with CommandProgress(counted=False, disable=disable) as bar:
        task, more, told = bar.add_task(description, total=total), 0.0, time.monotonic()

        def advance(amount: float) -> None:
            nonlocal more, told
            more += amount
            if time.monotonic() - told >= _REFRESH_S:
                bar.update(task, advance=more)
                more, told = 0.0, time.monotonic()

        yield advance
