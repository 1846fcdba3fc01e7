"""Two passes of one process that take turns: while the exchange of one is under way, the other computes.

Exactly one of them runs at any time. A pass gives its turn away where it would wait for an exchange that it has issued,
and waits for it once it has its turn again. So nothing is touched by both at once, and the order in which a process
issues exchanges follows from its program alone: it is the same in all processes of a group.

One pass runs in the thread that calls :meth:`Turns.beside`, the other one, a backward pass, in a thread of this module,
or in those threads in which autograd runs it for a GPU.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, TypeVar

import torch

T = TypeVar("T")
Keep = Callable[[], Callable[[], None]]
Lane = Literal[0, 1]  # 0: the pass of the calling thread; 1: the other one


class Turns:
    """Lets two passes take turns."""

    def __init__(self) -> None:
        self._pair: _Pair | None = None
        self._thread: ThreadPoolExecutor | None = None  # one for all steps, so that its pool of OpenMP threads stays

    def give(self) -> None:
        """Lets the other pass, if there is one, run up to its next wait, or its end; called before each wait.

        Raises:
            BaseException: What the other pass has raised.
        """
        if self._pair is not None:
            self._pair.give()

    def beside(self, other: Callable[[], None], own: Callable[[], T], keep: Keep) -> T:
        """Calls ``own`` in this thread, which begins, and ``other`` in another; returns once both have ended.

        Args:
            other: A backward pass.
            own: A pass that does not differentiate itself.
            keep: Notes the state of the process that belongs to a pass, and returns a function that restores it. What
                a pass finds after a wait is what it left.

        Returns:
            What ``own`` returns.

        Raises:
            BaseException: What either of them raises. The other one then ends at its next wait.
        """
        if self._thread is None:
            device = (
                partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_initialized() else None
            )
            self._thread = ThreadPoolExecutor(1, "backward", initializer=device)
        pair = self._pair = _Pair(keep)
        ended = self._thread.submit(pair.run, other)
        try:
            result = own()
            restore = keep()
        except BaseException:
            pair.cancelled = True
            raise
        finally:
            pair.end(0)
            ended.result()
            self._pair = None
        if pair.error is not None:
            raise pair.error
        restore()
        return result

    def close(self) -> None:
        """Ends the thread, if there is one."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None


class _Pair:
    """Two passes, one of which has the turn.

    Attributes:
        error: What the other pass has raised.
        cancelled: Whether the other pass should end.
    """

    def __init__(self, keep: Keep) -> None:
        self.error: BaseException | None = None
        self.cancelled = False
        self._keep, self._own = keep, threading.get_ident()
        self._changed = threading.Condition()
        self._turn: Lane = 0
        self._ended = [False, False]

    def give(self) -> None:
        lane: Lane = 0 if threading.get_ident() == self._own else 1
        other: Lane = 1 if lane == 0 else 0
        if not self._ended[other]:
            restore = self._keep()
            self._pass_to(other)
            self._await(lane)
            restore()
        if lane == 0 and self.error is not None:
            raise self.error
        if lane == 1 and self.cancelled:
            raise _Cancelled

    def run(self, other: Callable[[], None]) -> None:
        """Runs the other pass, whose turn comes later."""
        try:
            self._await(1)
            if not self.cancelled:
                other()
        except BaseException as error:
            self.error = error
        finally:
            self.end(1)

    def end(self, lane: Lane) -> None:
        """Ends a pass: the other one has all further turns."""
        self._ended[lane] = True
        self._pass_to(0 if lane == 1 else 1)

    def _pass_to(self, lane: Lane) -> None:
        with self._changed:
            self._turn = lane
            self._changed.notify_all()

    def _await(self, lane: Lane) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == lane)


class _Cancelled(BaseException):
    """Ends a pass beside which another has failed."""
