"""The ledger, which counts what every collective moves, by phase, kind of group, operation and call site."""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from tedlab.comm.collectives import TRAINING_PHASES, Collective, Operation, Phase
from tedlab.degrees import GroupKind


class Entry(NamedTuple):
    """The key of a line of the ledger."""

    phase: Phase
    kind: GroupKind
    op: Operation
    tag: str


@dataclass
class Count:
    """The totals of a line of the ledger.

    Attributes:
        calls: The number of collectives.
        payload_bytes: Bytes in this process's buffers, see :class:`Collective`.
        wire_bytes: Bytes that this process sends in a bandwidth-optimal algorithm.
        seconds: Time from launch to result; 0 unless the ledger is timed.
    """

    calls: int = 0
    payload_bytes: int = 0
    wire_bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Count") -> "Count":
        return Count(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __mul__(self, times: int) -> "Count":
        return Count(*(getattr(self, name) * times for name in self.__dataclass_fields__))


Totals = Mapping[Entry, Count]


def counted(calls: Iterable[Collective]) -> dict[Entry, Count]:
    """Returns the totals of calls, whether they happened or are expected."""
    totals: defaultdict[Entry, Count] = defaultdict(Count)
    for call in calls:
        totals[Entry(call.phase, call.kind, call.op, call.tag)] += Count(1, call.payload_bytes, call.wire_bytes)
    return dict(totals)


def differences(measured: Totals, expected: Totals) -> dict[Entry, tuple[Count, Count]]:
    """Returns the entries of the training phases whose calls or payload bytes differ, with both counts."""
    return {
        entry: (ours, theirs)
        for entry in sorted(measured.keys() | expected.keys())
        if entry.phase in TRAINING_PHASES
        for ours, theirs in [(measured.get(entry, Count()), expected.get(entry, Count()))]
        if (ours.calls, ours.payload_bytes) != (theirs.calls, theirs.payload_bytes)
    }


def summed(totals: Totals, *by: str) -> dict[tuple[str, ...], Count]:
    """Sums totals by some of an entry's fields, in the order of phases."""
    order = sorted(totals, key=lambda entry: ([*TRAINING_PHASES, entry.phase].index(entry.phase), entry))
    result: defaultdict[tuple[str, ...], Count] = defaultdict(Count)
    for entry in order:
        result[tuple(getattr(entry, field) for field in by)] += totals[entry]
    return dict(result)


class Ledger:
    """Counts collectives once it is registered as a hook of :class:`tedlab.comm.Collectives`.

    Args:
        timed: Whether to measure durations, too: by events in the stream on a GPU, and by the clock elsewhere, which
            is free, since collectives on a CPU are waited for anyway.
    """

    def __init__(self, timed: bool = False) -> None:
        self.timed = timed
        self.standing_for: Phase | None = None  # a phase to count instead of the calls' own, such as validation
        self._totals: defaultdict[Entry, Count] = defaultdict(Count)
        self._began: dict[int, Any] = {}  # by id() of the call
        self._events: list[tuple[Entry, Any, Any]] = []

    @property
    def totals(self) -> Totals:
        """Everything counted so far. With timing on a GPU, this waits for the collectives in flight."""
        for entry, start, end in self._events:
            end.synchronize()
            self._totals[entry].seconds += start.elapsed_time(end) / 1e3
        self._events.clear()
        return self._totals

    def __call__(self, call: Collective, event: Literal["start", "end"]) -> None:
        if event == "start":
            if self.timed:
                self._began[id(call)] = _now()
            return
        phase = call.phase if self.standing_for is None else self.standing_for
        entry = Entry(phase, call.kind, call.op, call.tag)
        count = self._totals[entry]
        count.calls += 1
        count.payload_bytes += call.payload_bytes
        count.wire_bytes += call.wire_bytes
        if self.timed:
            start, end = self._began.pop(id(call)), _now()
            if isinstance(end, float):
                count.seconds += end - start
            else:
                self._events.append((entry, start, end))


def _now() -> Any:
    if not torch.cuda.is_initialized():  # this process uses no GPU
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
