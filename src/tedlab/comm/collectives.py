"""Every collective of tedlab, by the kind of group it runs in, observable through hooks.

Nothing here is differentiable (see ``differentiable.py``) and nothing here knows about models. A collective over a
group of one process is not launched and no hook hears of it.
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

from tedlab.comm import compiled
from tedlab.comm.raw import Wait, way_of
from tedlab.comm.whereabouts import Waiting, Whereabouts
from tedlab.degrees import GroupKind

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
# Training, in order; then what is not: validation, averages for the log, states brought together for checkpoints, and
# comparisons of what should be alike.
Phase = Literal["forward", "recompute", "backward", "optimizer", "validation", "metrics", "checkpoint", "check"]
TRAINING_PHASES: tuple[Phase, ...] = ("forward", "recompute", "backward", "optimizer")


class Splits(NamedTuple):
    """How an all-to-all divides dimension 0 where it is not into equal parts.

    Attributes:
        sent: rows to each process of the group.
        received: rows from each.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]

    @property
    def reverse(self) -> "Splits":
        """Of the way back."""
        return Splits(self.received, self.sent)


@dataclass(frozen=True)
class Collective:
    """One collective call, as hooks see it.

    Attributes:
        op: the operation.
        kind: the kind of group it runs in.
        group_size: number of processes in that group.
        phase: the part of a training step it belongs to.
        tag: the call site, e.g. ``attention.reduce``; stable across layouts.
        shape: shape of this process's buffer: the input of a reduction or an all-to-all, the output of an all-gather.
        dtype: dtype of this process's buffer.
        exchanged_bytes: of an all-to-all with uneven splits: sent to other processes, and received from them.
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
        """Bytes that this process sends in a bandwidth-optimal algorithm (ring)."""
        if self.exchanged_bytes is not None:
            return self.exchanged_bytes[0]
        share = (self.group_size - 1) / self.group_size
        return self.payload_bytes * share * (2 if self.op == "all_reduce" else 1)

    @property
    def even_payload_bytes(self) -> float:
        """Payload of the collective with equal splits in which this process is as busy: what cost models know.

        With uneven splits the process is as busy as the larger of what it sends and what it receives makes it.
        """
        if self.exchanged_bytes is None:
            return self.payload_bytes
        return max(self.exchanged_bytes) * self.group_size / (self.group_size - 1)


Hook = Callable[[Collective, Literal["start", "end"]], None]


class Collectives:
    """Raw collectives over the groups of one process.

    Results are new tensors and inputs stay as they were, which activation checkpointing relies on.

    Args:
        groups: the process group of each kind that this process belongs to.
        place: where this process notes what it waits in; None: nobody asks.

    Attributes:
        place: see above.
        reader: values of an integer tensor for the host, which waits for the device.
    """

    def __init__(self, groups: Mapping[GroupKind, dist.ProcessGroup], place: Whereabouts | None = None) -> None:
        self._groups = dict(groups)
        self.place = place or Whereabouts()
        self.reader: Callable[[Tensor], list[Any]] = Tensor.tolist
        self._number = compiled.register(self)
        self._hooks: OrderedDict[int, Hook] = OrderedDict()  # RemovableHandle needs a weak reference

    def __deepcopy__(self, memo: dict[int, Any]) -> "Collectives":
        """Itself: groups of processes cannot be copied, and a copy of a model communicates as the model does."""
        return self

    @property
    def sizes(self) -> dict[GroupKind, int]:
        """Number of processes in this process's group of each kind."""
        return {kind: group.size() for kind, group in self._groups.items()}

    def size(self, kind: GroupKind) -> int:
        """Number of processes in this process's group of the kind."""
        return self.group(kind).size()

    def rank(self, kind: GroupKind) -> int:
        """Position of this process in its group of the kind."""
        return self.group(kind).rank()

    def group(self, kind: GroupKind) -> dist.ProcessGroup:
        """This process's group of the kind."""
        return self._groups[kind]

    @property
    def ranks(self) -> dict[GroupKind, list[int]]:
        """The processes of this process's group of each kind, by their number among all."""
        return {kind: dist.get_process_group_ranks(group) for kind, group in self._groups.items()}

    def register_hook(self, hook: Hook) -> RemovableHandle:
        """Calls ``hook(collective, "start")`` before and ``hook(collective, "end")`` after every collective.

        Hooks run in the order of registration. They may count, time, delay or raise.
        """
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def all_reduce(self, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase, op: str = "sum") -> Tensor:
        """Element-wise reduction over the group. Same shape on every process; ``op``: ``sum``, ``max`` or ``min``."""
        if torch.compiler.is_compiling() and self.size(kind) > 1:
            if op != "sum":
                raise NotImplementedError(f"all-reduce with op={op} inside torch.compile: only sums are known there")
            return compiled.run(x, "all_reduce", kind, tag, phase, self._number)
        return self.start_all_reduce(x, kind, tag=tag, phase=phase, op=op).wait()

    def start_all_reduce(self, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase, op: str = "sum") -> "Pending":
        """:meth:`all_reduce`, under way when this returns."""
        group = self.group(kind)
        return self._start("all_reduce", x, kind, tag, phase, lambda: way_of(x, group).all_reduce(x, op, group))

    def all_to_all(self, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase, splits: Splits | None = None) -> Tensor:
        """Sends the i-th of n slices along dimension 0 to process i; returns what came, in order of sender.

        The slices are equal, and the size of dimension 0 must be a multiple of the group size, unless ``splits`` says
        otherwise; what one process sends another must then be what the other receives. Uneven splits are not for code
        that is compiled.
        """
        if torch.compiler.is_compiling() and self.size(kind) > 1:
            return compiled.run(x, "all_to_all", kind, tag, phase, self._number)
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
        return self._start("all_to_all", x, kind, tag, phase, launch, exchanged=exchanged).wait()

    def reduce_scatter(self, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase) -> Tensor:
        """Sums over the group and leaves process i the i-th of n equal slices along dimension 0."""
        if torch.compiler.is_compiling() and self.size(kind) > 1:
            return compiled.run(x, "reduce_scatter", kind, tag, phase, self._number)
        return self.start_reduce_scatter(x, kind, tag=tag, phase=phase).wait()

    def start_reduce_scatter(self, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase) -> "Pending":
        """:meth:`reduce_scatter`, under way when this returns."""
        group = self.group(kind)
        return self._start("reduce_scatter", x, kind, tag, phase, lambda: way_of(x, group).reduce_scatter(x, group))

    def all_gather(self, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase) -> Tensor:
        """Every process's ``x``, stacked along dimension 0 in order of rank: n times its size."""
        if self.size(kind) == 1:
            return x
        if torch.compiler.is_compiling():
            return compiled.run(x, "all_gather", kind, tag, phase, self._number)
        group = self.group(kind)
        whole = torch.Size((group.size() * x.shape[0], *x.shape[1:]))
        return self._start(
            "all_gather", x, kind, tag, phase, lambda: way_of(x, group).all_gather(x, group), whole
        ).wait()

    def all_gather_into(self, out: Tensor, x: Tensor, kind: GroupKind, *, tag: str, phase: Phase) -> None:
        """Fills ``out`` with every process's ``x`` along dimension 0, in order of rank.

        :meth:`all_gather` into given memory, the one collective that does so: ``x`` may be this process's slice of
        ``out``. Not for code that is recomputed.
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
    """A collective under way. Wait exactly once."""

    _wait: Wait
    _on_end: Callable[[], None] | None = None  # None: there was nothing to do

    def wait(self) -> Tensor:
        """Its result, when it is there. Hooks hear of the end now: time in between may have been spent elsewhere."""
        result = self._wait()
        if self._on_end is not None:
            self._on_end()
        return result
