"""A record of a process's collectives, which the process writes as it runs and its watch reads."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import distributed as dist

from tedlab.degrees import GroupKind


class Waiting(NamedTuple):
    """The operation that a process waits in.

    Attributes:
        what: The collective (a :class:`tedlab.comm.Collective`), or a description of one that torch launches for us.
        kind: The kind of group.
        number: The collective's number among those of this kind; 0 for one that torch launches.
        since: When the wait began, by ``time.monotonic``.
        limited: Whether the timeout applies; it does not where the process also works, as when it saves a checkpoint.
    """

    what: object
    kind: GroupKind
    number: int
    since: float
    limited: bool = True


class Whereabouts:
    """What one process is doing. It costs each collective a few attribute writes, and wakes no thread.

    Attributes:
        launched: The number of collectives started, by kind of group.
        last: The last collective started.
        since: When it was started, by ``time.monotonic``.
        waiting: The operation that the process waits in, or None.
        step: The training step.
        on_failure: Called with an error that ended a collective, to which it may add a note.
    """

    def __init__(self) -> None:
        self.launched: defaultdict[GroupKind, int] = defaultdict(int)
        self.last: object = None
        self.since = time.monotonic()
        self.waiting: Waiting | None = None
        self.step = 0
        self.on_failure: Callable[[RuntimeError], None] | None = None

    def launch(self, what: object, kind: GroupKind) -> int:
        """Records that a collective starts, and returns its number among those of its kind of group."""
        number = self.launched[kind] = self.launched[kind] + 1
        self.last, self.since = what, time.monotonic()
        return number

    @contextmanager
    def within(self, what: str, limited: bool = True) -> Iterator[None]:
        """Records, for the duration of a ``with`` block, that this process waits for all others."""
        before, self.waiting = self.waiting, Waiting(what, "world", 0, time.monotonic(), limited)
        try:
            yield
        except RuntimeError as error:
            self.failed(error)
            raise
        finally:
            self.waiting = before

    def failed(self, error: RuntimeError) -> None:
        """Passes an error to ``on_failure`` if it is one that ends a collective."""
        if self.on_failure is not None and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            self.on_failure(error)
