"""Every collective of tedlab, by the kind of group it runs in, observable through hooks.

Nothing here is differentiable (see ``differentiable.py``) or knows about models. A collective over a group of one
process is not launched, and no hook is called for it.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.hooks import RemovableHandle

from tedlab.comm import compiled, reading
from tedlab.comm.raw import Wait, way_of
from tedlab.comm.turns import Turns
from tedlab.comm.whereabouts import Waiting, Whereabouts
from tedlab.degrees import GroupKind

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
# The phases of a training step in order, then the others: validation, averages for the log, states gathered for
# checkpoints, and checks that processes agree.
Phase = Literal["forward", "recompute", "backward", "optimizer", "validation", "metrics", "checkpoint", "check"]
TRAINING_PHASES: tuple[Phase, ...] = ("forward", "recompute", "backward", "optimizer")


class Splits(NamedTuple):
    """How an all-to-all divides dimension 0 into unequal parts.

    Attributes:
        sent: The number of rows sent to each process of the group.
        received: The number of rows received from each.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]

    @property
    def reverse(self) -> "Splits":
        """The splits of the all-to-all that sends everything back."""
        return Splits(self.received, self.sent)


@dataclass(frozen=True)
class Collective:
    """One collective call, as hooks see it.

    Attributes:
        op: The operation.
        kind: The kind of group it runs in.
        group_size: The number of processes in that group.
        phase: The part of a training step it belongs to.
        tag: The call site, e.g. ``attention.reduce``, which is the same in all layouts.
        shape: Shape of this process's buffer: the input of a reduction or an all-to-all, the output of an all-gather.
        dtype: Dtype of this process's buffer.
        exchanged_bytes: The bytes sent to and received from other processes in an all-to-all with uneven splits.
    """

    op: Operation
    kind: GroupKind
    group_size: int
    phase: Phase
    tag: str
    shape: torch.Size
    dtype: torch.dtype
    exchanged_bytes: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.op} {self.tag} ({self.phase})"

    @property
    def payload_bytes(self) -> int:
        """Bytes in this process's buffer."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def wire_bytes(self) -> float:
        """Bytes that this process sends in a bandwidth-optimal (ring) algorithm."""
        if self.exchanged_bytes is not None:
            return self.exchanged_bytes[0]
        share = (self.group_size - 1) / self.group_size
        return self.payload_bytes * share * (2 if self.op == "all_reduce" else 1)

    @property
    def even_payload_bytes(self) -> float:
        """Payload bytes of the evenly split collective that would keep this process as busy, as cost models assume.

        With uneven splits the larger of what the process sends and what it receives determines how busy it is.
        """
        if self.exchanged_bytes is None:
            return self.payload_bytes
        return max(self.exchanged_bytes) * self.group_size / (self.group_size - 1)


Hook = Callable[[Collective, Literal["start", "end"]], None]


class Collectives:
    """Raw collectives over the groups of one process.

    Results are new tensors and inputs do not change, which activation checkpointing relies on.

    Args:
        groups: This process's process group of each kind.
        place: The record in which this process notes what it waits in; None creates one of its own.

    Attributes:
        place: The record in which this process notes what it waits in.
        reader: Starts to copy the values of an integer tensor to the host, see :func:`tedlab.comm.reading.start`.
        turns: Lets another pass compute while exchanges are under way, see ``turns.py``.
    """

    def __init__(self, groups: Mapping[GroupKind, dist.ProcessGroup], place: Whereabouts | None = None) -> None:
        self._groups = dict(groups)
        self.place = place or Whereabouts()
        self.reader: reading.Reader = reading.start
        self.turns = Turns()
        self._number = compiled.register(self)
        self._hooks: OrderedDict[int, Hook] = OrderedDict()  # RemovableHandle needs a type that allows weak references

    def __deepcopy__(self, memo: dict[int, Any]) -> "Collectives":
        """Returns itself: process groups cannot be copied, and a copy of a model communicates as the model does."""
        return self

    @property
    def sizes(self) -> dict[GroupKind, int]:
        """Number of processes in this process's group of each kind."""
        return {kind: group.size() for kind, group in self._groups.items()}

    def size(self, kind: GroupKind) -> int:
        """Returns the number of processes in this process's group of the kind."""
        return self.group(kind).size()

    def rank(self, kind: GroupKind) -> int:
        """Returns this process's rank in its group of the kind."""
        return self.group(kind).rank()

    def group(self, kind: GroupKind) -> dist.ProcessGroup:
        """Returns this process's group of the kind."""
        return self._groups[kind]

    @property
    def ranks(self) -> dict[GroupKind, list[int]]:
        """The global ranks in this process's group of each kind."""
        return {kind: dist.get_process_group_ranks(group) for kind, group in self._groups.items()}

    def register_hook(self, hook: Hook) -> RemovableHandle:
        """Calls ``hook(collective, "start")`` before and ``hook(collective, "end")`` after every collective.

        Hooks run in the order of registration. They may count, time, delay or raise.
        """
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def all_reduce(self, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase, op: str = "sum") -> Tensor:
        """Reduces ``x``, of the same shape on every process, element-wise; ``op`` is ``sum``, ``max`` or ``min``."""
        if torch.compiler.is_compiling() and self.size(kind) > 1:
            if op != "sum":
                raise NotImplementedError(f"all-reduce with op={op} inside torch.compile: only sums are known there")
            return compiled.run(x, "all_reduce", kind, tag, phase, self._number)
        return self.start_all_reduce(x, kind, tag=tag, phase=phase, op=op).wait()

    def start_all_reduce(self, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase, op: str = "sum") -> "Pending":
        """Starts an :meth:`all_reduce` without waiting for it."""
        group = self.group(kind)
        return self._start("all_reduce", x, kind, tag, phase, lambda: way_of(x, group).all_reduce(x, op, group))

    def all_to_all(self, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase, splits: Splits | None = None) -> Tensor:
        """Sends slice i along dimension 0 to process i, and returns the received slices in order of sender.

        Without ``splits`` the slices are equal, and the group size must divide dimension 0. With ``splits``, the rows
        that one process sends to another must be as many as the other receives. Compiled code cannot use ``splits``.
        """
        if torch.compiler.is_compiling() and self.size(kind) > 1:
            return compiled.run(x, "all_to_all", kind, tag, phase, self._number)
        return self.start_all_to_all(x, kind, tag=tag, phase=phase, splits=splits).wait()

    def start_all_to_all(
        self, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase, splits: Splits | None = None
    ) -> "Pending":
        """Starts an :meth:`all_to_all` without waiting for it."""
        group = self.group(kind)

        def launch() -> Wait:
            received, sent = (None, None) if splits is None else map(list, splits.reverse)
            return way_of(x, group).all_to_all(x, received, sent, group)

        exchanged = None
        if splits is not None:
            own, row = group.rank(), x.shape[1:].numel() * x.itemsize
            exchanged = (
                (sum(splits.sent) - splits.sent[own]) * row,
                (sum(splits.received) - splits.received[own]) * row,
            )
        return self._start("all_to_all", x, kind, tag, phase, launch, exchanged=exchanged)

    def reduce_scatter(self, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase) -> Tensor:
        """Sums over the group and returns the i-th of n equal slices along dimension 0 on process i."""
        if torch.compiler.is_compiling() and self.size(kind) > 1:
            return compiled.run(x, "reduce_scatter", kind, tag, phase, self._number)
        return self.start_reduce_scatter(x, kind, tag=tag, phase=phase).wait()

    def start_reduce_scatter(self, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase) -> "Pending":
        """Starts a :meth:`reduce_scatter` without waiting for it."""
        group = self.group(kind)
        return self._start("reduce_scatter", x, kind, tag, phase, lambda: way_of(x, group).reduce_scatter(x, group))

    def all_gather(self, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase) -> Tensor:
        """Concatenates every process's ``x`` along dimension 0 in order of rank, which makes it n times as large."""
        if self.size(kind) == 1:
            return x
        if torch.compiler.is_compiling():
            return compiled.run(x, "all_gather", kind, tag, phase, self._number)
        return self.start_all_gather(x, kind, tag=tag, phase=phase).wait()

    def start_all_gather(self, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase) -> "Pending":
        """Starts an :meth:`all_gather` without waiting for it."""
        group = self.group(kind)
        whole = torch.Size((group.size() * x.shape[0], *x.shape[1:]))
        return self._start("all_gather", x, kind, tag, phase, lambda: way_of(x, group).all_gather(x, group), whole)

    def all_gather_into(self, out: Tensor, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase) -> None:
        """Fills ``out`` with every process's ``x`` along dimension 0, in order of rank.

        This is the one collective that writes into given memory; ``x`` may be this process's slice of ``out``. It must
        not be used in code that is recomputed.
        """
        if self.size(kind) == 1:
            out.copy_(x)
            return
        group = self.group(kind)
        self._start("all_gather", out, kind, tag, phase, lambda: way_of(x, group).all_gather_into(out, x, group)).wait()

    def _start(
        self,
        op: Operation,
        x: Tensor,
        kind: GroupKind,
        tag: str,
        phase: Phase,
        launch: Callable[[], Wait],
        buffer: torch.Size | None = None,
        exchanged: tuple[int, int] | None = None,
    ) -> "Pending":
        if self.size(kind) == 1:
            return Pending(lambda: x)
        shape = x.shape if buffer is None else buffer
        call = Collective(op, kind, self.size(kind), phase, tag, shape, x.dtype, exchanged)
        self._tell(call, "start")
        place = self.place
        number = place.launch(call, kind)
        wait = launch()

        def noted() -> Tensor:
            place.waiting = Waiting(call, kind, number, time.monotonic())
            try:
                result = wait()
            except RuntimeError as error:
                place.failed(error)
                raise
            place.waiting = None
            return result

        return Pending(noted, lambda: self._tell(call, "end"))

    def _tell(self, call: Collective, event: Literal["start", "end"]) -> None:
        for hook in list(self._hooks.values()):
            hook(call, event)


@dataclass(frozen=True)
class Pending:
    """A collective in flight. Call :meth:`wait` exactly once."""

    _wait: Wait
    _on_end: Callable[[], None] | None = None  # None if nothing was launched

    def wait(self) -> Tensor:
        """Waits for the result and returns it. Hooks get the end event now, however long ago the collective ended."""
        result = self._wait()
        if self._on_end is not None:
            self._on_end()
        return result
