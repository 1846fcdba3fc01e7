"""A watchdog for the collectives of each process: none hangs forever, and the error says who waited for whom.

If some processes do not join a collective, gloo fails after the timeout with an error that names nobody, and NCCL
aborts the process. The watch runs two threads in each process. One publishes this process's state through the store of
the process group, and reads the others' reports once this process has waited long. The other never touches the store,
which may hang with the process that hosts it; it ends this process if a collective times out and torch does not react.
"""

import atexit
import functools
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from tedlab._compat.torch import default_store
from tedlab.comm import Collective, Whereabouts
from tedlab.degrees import GroupKind
from tedlab.launch import failures

TORCH_FIRST_S = 5.0  # how long torch has, after the timeout, to raise in the waiting thread
UNWIND_S = 12.0  # how long a process has, after such an error, to end by itself
_LAST_WORDS_S = 5.0  # how long it may take to say why, since the disk or pipe may hang as well
_MOST_SHOWN = 16  # the most ranks that a message lists
_NO_CODE_OF_INTEREST = (str(Path(torch.__file__).parent), str(Path(os.__file__).parent), "<frozen")


@dataclass
class Report:
    """What one process tells the others about itself.

    Attributes:
        beat: The number of reports so far; a process is alive as long as it grows.
        waiting: The operation that it waits in, or None.
        kind: The kind of the group that it waits for, or in which it started its last collective.
        number: The number of that collective, see :class:`tedlab.comm.Waiting`.
        group: The ranks of that group.
        waited: How long it has waited, in seconds.
        launched: The number of collectives it has started, by kind of group.
        last: The collective that it started last.
        idle: Seconds since it started that collective.
        step: The training step.
        place: The line that its main thread is executing, outside torch and the standard library.
        ended: Whether its watch was stopped, which makes this its last report.
    """

    beat: int
    waiting: str | None = None
    kind: GroupKind | None = None
    number: int = 0
    group: list[int] = field(default_factory=list)
    waited: float = 0.0
    launched: dict[GroupKind, int] = field(default_factory=dict)
    last: str = ""
    idle: float = 0.0
    step: int = 0
    place: str = ""
    ended: bool = False


class Board(Protocol):
    """The key-value store that processes exchange reports through, such as a ``torch.distributed`` store."""

    def set(self, key: str, value: str) -> None:
        """Stores a value under a key."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Returns whether all of these keys exist."""
        ...

    def get(self, key: str) -> bytes:
        """Returns the value of a key."""
        ...


_numbers = itertools.count()  # numbers the watches of this process
_live: "Watch | None" = None  # a process has one watch at a time


def watch(place: Whereabouts, timeout: timedelta) -> "Watch | None":
    """Starts a watch over this process and stops the previous one.

    All processes of the group must call this equally often, since the watches of the n-th calls talk to each other.

    Args:
        place: The process's record of its collectives.
        timeout: The timeout of a collective.

    Returns:
        The watch, or None if there is one process or the backend is neither gloo nor NCCL.
    """
    if dist.get_world_size() == 1 or dist.get_backend() not in ("gloo", "nccl"):
        return None
    store = _second_connection(default_store())
    global _live
    if _live is not None:
        _live.stop()
    board = dist.PrefixStore(f"watch/{next(_numbers)}", store)
    _live = Watch(place, timeout.total_seconds(), dist.get_rank(), dist.get_world_size(), board)
    return _live


@functools.lru_cache(maxsize=1)
def _second_connection(store: dist.Store) -> dist.Store:
    """Opens another connection to a store, since a connection serves one request at a time.

    All watches share it, and the cache keeps it alive: a FileStore counts the copies that are destroyed, even those
    that a forked data loader worker garbage-collects, and deletes its file after as many as there are processes.
    """
    second = store.clone()  # type: ignore[attr-defined]
    second.set_timeout(timedelta(seconds=5))
    return second


class Watch:
    """The watch over one process; the module docstring describes it.

    Args:
        place: The process's record of its collectives.
        timeout_s: The timeout of a collective, in seconds.
        rank: The rank of this process.
        world_size: The number of processes.
        board: The store that processes exchange reports through.

    Attributes:
        groups: The ranks in this process's group of each kind; only ``world`` until the strategy sets the others.
    """

    def __init__(self, place: Whereabouts, timeout_s: float, rank: int, world_size: int, board: Board) -> None:
        self._place, self._timeout_s, self._rank, self._board = place, timeout_s, rank, board
        self.groups: Mapping[GroupKind, Sequence[int]] = {"world": range(world_size)}
        self._every_s = min(5.0, max(0.1, timeout_s / 20))
        self._beat = 0
        self._heard: dict[int, tuple[Report, float]] = {}  # each rank's last report, and when it arrived
        self._board_is_gone = False
        self._failed_at: float | None = None
        self._over = threading.Event()
        self._main = threading.main_thread().ident
        place.on_failure = self.annotate
        self._threads = [
            threading.Thread(target=work, name=f"tedlab-{work.__name__.strip('_')}", daemon=True)
            for work in (self._talk, self._guard)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)  # a thread that wakes up during interpreter shutdown would abort the process

    @property
    def stopped(self) -> bool:
        """Whether the watch was stopped."""
        return self._over.is_set()

    def stop(self) -> None:
        """Publishes a last report, marked as such, and ends the threads. Takes at most 2 s."""
        self._over.set()
        for thread in self._threads:
            thread.join(1.0)
        atexit.unregister(self.stop)

    def annotate(self, error: RuntimeError) -> None:
        """Adds a note on who waited for whom to the error of a collective; the process then has seconds to end."""
        if self._failed_at is None:
            self._failed_at = time.monotonic()
            error.add_note(self.explain())

    def explain(self) -> str:
        """Returns a message about who waits for whom, as far as this process knows."""
        now, heard = time.monotonic(), dict(self._heard)  # copied, since the other thread keeps adding to it
        reports = {rank: report for rank, (report, _) in heard.items()}
        silent = {rank: now - at for rank, (_, at) in heard.items() if now - at > max(0.5, 5 * self._every_s)}
        return explain(self._rank, self._timeout_s, {**reports, self._rank: self._report()}, silent)

    def _report(self) -> Report:
        now, waiting = time.monotonic(), self._place.waiting
        report = Report(
            self._beat,
            launched=dict(self._place.launched),
            last="" if self._place.last is None else str(self._place.last),
            idle=now - self._place.since,
            step=self._place.step,
            ended=self.stopped,
        )
        if waiting is not None:
            report.waiting, report.kind, report.number = str(waiting.what), waiting.kind, waiting.number
            report.group, report.waited = self._ranks(waiting.kind), now - waiting.since
        elif isinstance(last := self._place.last, Collective):
            report.kind, report.number = last.kind, self._place.launched[last.kind]
            report.group = self._ranks(last.kind)
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None and frame.f_code.co_filename.startswith(_NO_CODE_OF_INTEREST):
            frame = frame.f_back
        if frame is not None:
            code = frame.f_code
            report.place = f"{'/'.join(Path(code.co_filename).parts[-2:])}:{frame.f_lineno} in {code.co_name}"
        return report

    def _ranks(self, kind: GroupKind) -> list[int]:
        return list(self.groups.get(kind, self.groups["world"]))

    # ---- the thread that talks -----------------------------------------------------------------------------------

    def _talk(self) -> None:
        last = False
        while not last:
            last = self.stopped  # read before the report is made, so that the last report says that it is the last
            try:
                self._beat += 1
                self._board.set(str(self._rank), json.dumps(asdict(self._report())))
                if not last and self._seconds_still() > self._timeout_s / 2:
                    self._ask()
            except dist.DistNetworkError:  # the store no longer exists
                self._board_is_gone = True
                return
            except (RuntimeError, ValueError):  # the store did not answer in time
                pass
            if not last:
                self._over.wait(self._every_s)

    def _seconds_still(self) -> float:
        """Returns how long this process has been waiting, or has started no collective."""
        waiting = self._place.waiting
        return time.monotonic() - (self._place.since if waiting is None else waiting.since)

    def _ask(self) -> None:
        """Reads the reports of the processes that this one may wait for, of those that they wait for, and so on."""
        asked = {self._rank}
        to_ask = {rank for kind in self.groups for rank in self._ranks(kind)} - asked
        while to_ask:
            rank = min(to_ask)
            asked.add(rank)
            key = str(rank)
            if self._board.check([key]):
                report = Report(**json.loads(self._board.get(key)))
                known = self._heard.get(rank)
                if known is None or known[0].beat != report.beat:
                    self._heard[rank] = report, time.monotonic()
                to_ask |= set(report.group)
            to_ask -= asked

    # ---- the thread that ends this process -----------------------------------------------------------------------

    def _guard(self) -> None:
        while not self._over.wait(self._every_s):
            now, waiting = time.monotonic(), self._place.waiting
            failed_at, limit = self._failed_at, self._timeout_s + TORCH_FIRST_S
            if failed_at is not None:
                over = now - failed_at > UNWIND_S
            elif waiting is not None:
                over = waiting.limited and now - waiting.since > limit
            else:  # with NCCL the program does not wait for the collective itself, only for later uses of its result
                over = now - self._place.since > limit and self._is_ahead()
            if over and not self.stopped:
                self._end()

    def _end(self) -> None:
        """Ends this process, even if it cannot record why."""
        try:
            words = threading.Thread(target=lambda: failures.record(self.explain()), daemon=True)
            words.start()
            words.join(_LAST_WORDS_S)
        finally:
            os._exit(1)

    def _is_ahead(self) -> bool:
        """Returns whether some process is known not to have joined a collective that this one has started.

        Processes that have ended do not count. Nor do reports from a store that no longer exists: they may be out of
        date, because other processes may have joined and ended together with the one that hosted the store.
        """
        if self._board_is_gone:
            return False
        heard = {rank: report for rank, (report, _) in dict(self._heard).items() if not report.ended}
        return any(
            heard[rank].launched.get(kind, 0) < number
            for kind, number in list(self._place.launched.items())
            for rank in self._ranks(kind)
            if rank in heard
        )


def explain(rank: int, timeout_s: float, reports: Mapping[int, Report], silent: Mapping[int, float]) -> str:
    """Returns a message about who waits for whom.

    Args:
        rank: The process that gives up.
        timeout_s: The timeout of a collective, in seconds.
        reports: The last report of each process that has sent one, by rank.
        silent: Seconds since the last report of each process that is overdue, by rank.
    """
    involved = {*reports, *reports[rank].group, *(other for report in reports.values() for other in report.group)}
    to_tell = [rank, *sorted(involved - {rank})]
    lines = [f"A collective was not joined by all (comm.timeout_s={timeout_s:g}), as process {rank} sees it:"]
    lines += [f"  process {one}: {_state(one, reports, silent)}" for one in to_tell[:_MOST_SHOWN]]
    if to_tell[_MOST_SHOWN:]:
        lines.append(f"  … and {len(to_tell) - _MOST_SHOWN} more")
    return "\n".join(lines)


def _state(rank: int, reports: Mapping[int, Report], silent: Mapping[int, float]) -> str:
    report = reports.get(rank)
    if report is None:
        return "nothing was heard of it"
    if report.ended:
        return f"it has ended, {_after(report)}, at step {report.step}"
    if rank in silent:
        return (
            f"no sign of life for {silent[rank]:.0f} s (stopped, or cut off?); before that {_doing(report)}, "
            f"at step {report.step}"
        )
    at = f"at step {report.step}"
    numbered = f", number {report.number}" if report.number else ""
    group = f"group {report.kind}: {', '.join(map(str, report.group))}{numbered}"
    if report.waiting is None:
        absent = [other for other in report.group if other in reports and _is_behind(reports[other], report)]
        if absent:
            return f"started {report.last} ({group}) {report.idle:.0f} s ago, without {_named(absent)}, {at}"
        return f"in no collective for {report.idle:.0f} s, {_after(report)}, {at}; it is at {report.place}"
    missing = [
        other
        for other in report.group
        if other != rank and (other in silent or not _is_there(reports.get(other), report))
    ]
    awaited = f" for {_named(missing)}" if missing else ""
    return f"waits{awaited} in {report.waiting} ({group}) for {report.waited:.0f} s, {at}"


def _is_behind(other: Report, report: Report) -> bool:
    """Returns whether another process has not yet started the last collective of this one."""
    return report.kind is not None and other.launched.get(report.kind, 0) < report.number


def _is_there(other: Report | None, report: Report) -> bool:
    """Returns whether another process of the group waits in the same collective."""
    return other is not None and (other.waiting, other.kind, other.number) == (
        report.waiting,
        report.kind,
        report.number,
    )


def _doing(report: Report) -> str:
    return f"in {report.waiting}" if report.waiting else f"in no collective, {_after(report)}"


def _after(report: Report) -> str:
    return f"after {report.last}" if report.last else "before its first"


def _named(ranks: Sequence[int]) -> str:
    return f"process{'es' if ranks[1:] else ''} {', '.join(map(str, ranks))}"
