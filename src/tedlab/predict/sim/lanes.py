"""The timeline of a step: what the processor and each class of links do, and when.

There is one lane for computing, and one for each class of links: inside a node, and between nodes. A link serves one
exchange at a time, in the order in which they were issued. Transfers that *yield* (reductions of gradients during the
backward pass) use it only while no exchange does: an exchange that is issued meanwhile goes first, and they go on
afterwards.
"""

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal, NamedTuple

from tedlab.comm import Phase
from tedlab.predict.cost import LinkClass

Lane = Literal["compute"] | LinkClass
LANES: tuple[Lane, ...] = ("compute", "in_node", "between_nodes")


class Span(NamedTuple):
    """A time in which a lane is busy.

    Attributes:
        lane: The lane.
        phase: The phase of the step.
        name: The cause of computing, or a collective's operation and tag.
        start, end: Predicted seconds since the start of the step.
    """

    lane: Lane
    phase: Phase
    name: str
    start: float
    end: float


@dataclass(eq=False)
class Transfer:
    """A collective on a link.

    Attributes:
        link: The class of links.
        phase, name: See :class:`Span`.
        issued: When it was issued.
        seconds: How long it takes by itself.
        yields: Whether it gives way to those that do not.
        left: The seconds that it still needs.
        start, end: When it began and ended; None: not yet known.
    """

    link: LinkClass
    phase: Phase
    name: str
    issued: float
    seconds: float
    yields: bool = False
    left: float = 0.0
    start: float | None = None
    end: float | None = None


class Lanes:
    """Records what each lane does.

    Attributes:
        spans: The times in which lanes were busy so far; consecutive ones of the processor for the same cause are one.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._links = {link: _Link(self.spans) for link in ("in_node", "between_nodes")}
        self._computing: int | None = None  # the index of the last span of the processor

    def compute(self, phase: Phase, name: str, start: float, end: float) -> None:
        """Records that the processor is busy."""
        if self._computing is not None:
            last = self.spans[self._computing]
            if (last.phase, last.name, last.end) == (phase, name, start):
                self.spans[self._computing] = last._replace(end=end)
                return
        self._computing = len(self.spans)
        self.spans.append(Span("compute", phase, name, start, end))

    def issue(
        self, link: LinkClass, phase: Phase, name: str, at: float, seconds: float, yields: bool = False
    ) -> Transfer:
        """Gives a collective to its link. Calls are in the order of ``at``, which is at or after each end asked for."""
        transfer = Transfer(link, phase, name, at, seconds, yields, seconds)
        self._links[link].issue(transfer)
        return transfer

    def end(self, transfer: Transfer) -> float:
        """Returns when a collective ends if nothing else is issued before that, as when the processor waits for it."""
        self._links[transfer.link].finish(transfer)
        assert transfer.end is not None
        return transfer.end


class _Link:
    def __init__(self, spans: list[Span]) -> None:
        self._spans = spans
        self._taken = 0.0  # until when those that do not yield occupy the link
        self._served = 0.0  # until when those that yield have been served
        self._yielding: deque[Transfer] = deque()

    def issue(self, transfer: Transfer) -> None:
        if transfer.yields:
            self._yielding.append(transfer)
            return
        self._serve(transfer.issued)
        transfer.start = max(transfer.issued, self._taken)
        transfer.end = self._taken = transfer.start + transfer.seconds
        self._record(transfer, transfer.start, transfer.end)

    def finish(self, transfer: Transfer) -> None:
        while transfer.end is None:
            self._next(inf)

    def _serve(self, until: float) -> None:
        while self._yielding and self._next(until):
            pass

    def _next(self, until: float) -> bool:
        """Serves the first of those that yield while the link is free, and returns whether it has ended."""
        first = self._yielding[0]
        begin = max(self._served, self._taken, first.issued)
        if begin >= until:
            return False
        ended = begin + first.left <= until
        self._served = begin + first.left if ended else until
        if first.start is None:
            first.start = begin
        self._record(first, begin, self._served)
        first.left -= self._served - begin
        if ended:
            first.end = self._served
            self._yielding.popleft()
        return ended

    def _record(self, transfer: Transfer, start: float, end: float) -> None:
        self._spans.append(Span(transfer.link, transfer.phase, transfer.name, start, end))


def write_trace(spans: Iterable[Span], path: Path, rank: int) -> None:
    """Writes spans as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open, in microseconds."""
    names = [
        {"ph": "M", "name": "thread_name", "pid": rank, "tid": number, "args": {"name": lane.replace("_", " ")}}
        for number, lane in enumerate(LANES)
    ]
    events = [
        {
            **{"ph": "X", "name": span.name, "cat": span.phase, "pid": rank, "tid": LANES.index(span.lane)},
            **{"ts": round(span.start * 1e6, 3), "dur": round((span.end - span.start) * 1e6, 3)},
        }
        for span in spans
    ]
    process = {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}, predicted"}}
    path.write_text(json.dumps({"traceEvents": [process, *names, *events], "displayTimeUnit": "ms"}))
