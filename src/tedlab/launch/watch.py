"""A watch over each process's collectives: none waits for ever, and whoever gives up says who waited for whom.

A collective that others do not join fails in gloo after its timeout, with an error that names nobody; NCCL aborts the
process. The watch is two threads beside a process's work. One tells the others, through the store of the process group,
where this process is, and hears from them when there is reason to ask. The other never touches the store, which may
hang with the process that keeps it: it ends this process when a collective's time is over and torch has not done so.
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

TORCH_FIRST_S = 5.0  # so long torch has, after a collective's time, to raise in the thread that waits
UNWIND_S = 12.0  # so long a process has, after such an error, to end by itself
_LAST_WORDS_S = 5.0  # so long it may take to say why, on a disk or a pipe that may hang as well
_MOST_SHOWN = 16  # ranks in a message
_NO_CODE_OF_INTEREST = (str(Path(torch.__file__).parent), str(Path(os.__file__).parent), "<frozen")


@dataclass
class Report:
    """What one process tells the others.

    Attributes:
        beat: how often it has told: alive if this grows.
        waiting: what it waits in; None: in nothing.
        kind: of the group that it waits for, or that it started its last collective in.
        number: of that collective, see :class:`tedlab.comm.Waiting`.
        group: the ranks of that group.
        waited: for so many seconds.
        launched: collectives by kind of group.
        last: the collective that it started last.
        idle: seconds since then.
        step: of training.
        place: the line that its main thread is at, outside torch and Python's library.
        ended: its watch was stopped, as at the end of the process: this is its last report.
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
    """Where processes tell each other; a store of torch.distributed."""

    def set(self, key: str, value: str) -> None:
        """Puts a value there."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all of these are there."""
        ...

    def get(self, key: str) -> bytes:
        """What is there."""
        ...


_numbers = itertools.count()  # of the watches of this process
_live: "Watch | None" = None  # it speaks for the process: there is one at a time


def watch(place: Whereabouts, timeout: timedelta) -> "Watch | None":
    """Starts the watch over this process and stops the one before; None where nobody could be waited for.

    All processes of the group call this as often as each other: those of one call hear each other.

    Args:
        place: what the process notes on its way.
        timeout: of a collective.
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
    """Another connection to a store, since one serves one at a time.

    All watches share it, and it is kept: a FileStore counts the copies that are dropped, also those that a forked
    worker of a data loader collects as garbage, and after so many as there are processes it removes the file.
    """
    second = store.clone()  # type: ignore[attr-defined]
    second.set_timeout(timedelta(seconds=5))
    return second


class Watch:
    """See the module.

    Args:
        place: what the process notes on its way.
        timeout_s: of a collective.
        rank: of this process.
        world_size: of all.
        board: see :class:`Board`.

    Attributes:
        groups: this process's ranks of each kind of group; until they are there it has one, ``world``.
    """

    def __init__(self, place: Whereabouts, timeout_s: float, rank: int, world_size: int, board: Board) -> None:
        self._place, self._timeout_s, self._rank, self._board = place, timeout_s, rank, board
        self.groups: Mapping[GroupKind, Sequence[int]] = {"world": range(world_size)}
        self._every_s = min(5.0, max(0.1, timeout_s / 20))
        self._beat = 0
        self._heard: dict[int, tuple[Report, float]] = {}  # the last of each, and when it first was there
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
        atexit.register(self.stop)  # a thread that is woken while Python ends would abort the process

    @property
    def stopped(self) -> bool:
        """Whether it watches no more."""
        return self._over.is_set()

    def stop(self) -> None:
        """Leaves a last report, which says that no other will follow, and ends the threads. Takes 2 s at most."""
        self._over.set()
        for thread in self._threads:
            thread.join(1.0)
        atexit.unregister(self.stop)

    def annotate(self, error: RuntimeError) -> None:
        """Adds who waited for whom to the error that ended a collective. The process has some seconds left."""
        if self._failed_at is None:
            self._failed_at = time.monotonic()
            error.add_note(self.explain())

    def explain(self) -> str:
        """Who waits for whom, as far as this process has heard."""
        now, heard = time.monotonic(), dict(self._heard)  # a copy: the other thread hears more
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
            last = self.stopped  # before the report, which then says so
            try:
                self._beat += 1
                self._board.set(str(self._rank), json.dumps(asdict(self._report())))
                if not last and self._seconds_still() > self._timeout_s / 2:
                    self._ask()
            except dist.DistNetworkError:  # the store is gone
                self._board_is_gone = True
                return
            except (RuntimeError, ValueError):  # it did not answer in time
                pass
            if not last:
                self._over.wait(self._every_s)

    def _seconds_still(self) -> float:
        """How long this process has waited, or started no collective."""
        waiting = self._place.waiting
        return time.monotonic() - (self._place.since if waiting is None else waiting.since)

    def _ask(self) -> None:
        """Hears from those that this process may wait for, from those that these wait for, and so on."""
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
            else:  # of NCCL the program waits for no collective, only for what becomes of it
                over = now - self._place.since > limit and self._is_ahead()
            if over and not self.stopped:
                self._end()

    def _end(self) -> None:
        """Ends this process, whatever becomes of its last words."""
        try:
            words = threading.Thread(target=lambda: failures.record(self.explain()), daemon=True)
            words.start()
            words.join(_LAST_WORDS_S)
        finally:
            os._exit(1)

    def _is_ahead(self) -> bool:
        """Whether a collective that this process has started lacks one of its group, as far as is known by now.

        Who has ended is not waited for, and what was heard on a board that is gone may be long past: with its keeper
        others may have ended, after they had joined.
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
    """A message about who waits for whom.

    Args:
        rank: who gives up.
        timeout_s: of a collective.
        reports: the last of each process, as far as there is one.
        silent: seconds for which a process that must report has not.
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
    """Whether another process has not started the last collective of this one."""
    return report.kind is not None and other.launched.get(report.kind, 0) < report.number


def _is_there(other: Report | None, report: Report) -> bool:
    """Whether another process of the group waits in the same collective."""
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
