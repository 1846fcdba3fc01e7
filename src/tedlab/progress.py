"""Shows how far a command has come: a bar on a terminal, and a line now and then where there is none."""

import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
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

_FIRST_S = 5.0  # what is done by then needs no line
_LONGEST_S = 60.0  # time without one; it doubles from line to line until then


class CommandProgress(Progress):
    """One bar with the time that is left, on stderr, which disappears at the end.

    Args:
        counted: Whether to show how many of how many are done; otherwise a percentage.
        disable: Whether to show nothing, as in all processes but the first.
    """

    def __init__(self, counted: bool = True, disable: bool = False) -> None:
        console = Console(stderr=True)
        count = MofNCompleteColumn() if counted else TaskProgressColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn())
        self._lines = not disable and not console.is_terminal
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
