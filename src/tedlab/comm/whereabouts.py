"""Where a process is, as far as its collectives tell. It writes this down on its way; its watch reads it."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import distributed as dist

from tedlab.degrees import GroupKind


class Waiting(NamedTuple):
    """What a process waits in.

    Attributes:
        what: the collective (a :class:`tedlab.comm.Collective`), or a word for one that torch makes for us.
        kind: of group.
        number: of the collective among those of this kind; 0: not one of ours, but torch's.
        since: by ``time.monotonic``.
        limited: whether all the time is spent waiting for others; not so when a checkpoint is written, say.
    """

    what: object
    kind: GroupKind
    number: int
    since: float
    limited: bool = True


class Whereabouts:
    """What one process does. Costs a collective some attributes' writes, and wakes nobody.

    Attributes:
        launched: collectives that were started, by kind of group.
        last: the last of them.
        since: when that was, by ``time.monotonic``.
        waiting: what it waits in; None: in nothing.
        step: of training.
        on_failure: hears of an error that ended a collective, and may add a note to it.
    """

    def __init__(self) -> None:
        self.launched: defaultdict[GroupKind, int] = defaultdict(int)
        self.last: object = None
        self.since = time.monotonic()
        self.waiting: Waiting | None = None
        self.step = 0
        self.on_failure: Callable[[RuntimeError], None] | None = None

    def launch(self, what: object, kind: GroupKind) -> int:
        """Notes that a collective starts; returns its number."""
        number = self.launched[kind] = self.launched[kind] + 1
        self.last, self.since = what, time.monotonic()
        return number

    @contextmanager
    def within(self, what: str, limited: bool = True) -> Iterator[None]:
        """Notes that this process waits for all others, for as long as it does."""
        before, self.waiting = self.waiting, Waiting(what, "world", 0, time.monotonic(), limited)
        try:
            yield
        except RuntimeError as error:
            self.failed(error)
            raise
        finally:
            self.waiting = before

    def failed(self, error: RuntimeError) -> None:
        """Tells of an error that ended a collective, if it is one of those."""
        if self.on_failure is not None and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            self.on_failure(error)
