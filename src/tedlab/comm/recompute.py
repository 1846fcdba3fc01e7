"""Activation checkpointing that knows about communication: the paper's CAC (§5.2), and routing that cannot flip.

A checkpointed region runs twice: first without keeping activations, then, in the backward pass, again. The second pass
repeats the collectives of the first, unless their results were kept. What it does at each call site is a :class:`Plan`,
by tag; :func:`tedlab.comm.keep.plan` makes one. Whatever the plan, the experts that tokens go to are those of the
first pass (:func:`pin`): recomputed arithmetic may differ in the last bit, and a token must not change its expert.

torch's selective checkpointing could keep collectives' results, too, but sees every operation of the region (twice the
time of a small eager forward pass), and cannot leave out what the kept results make superfluous. Where the region is
compiled neither matters, and it is used.
"""

import functools
import threading
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from tedlab._compat.torch import version
from tedlab.comm.collectives import Collectives, Phase


class Second(Enum):
    """What the second pass does at a call site."""

    AGAIN = "again"  # it communicates
    WHOLE = "whole"  # it takes the first pass's result, kept whole
    SLICE = "slice"  # it gathers the result, which all tensor ranks hold alike, from the 1/T that each has kept
    NOTHING = "nothing"  # nobody needs the result: neither kept nor communicated, its memory is never read


Plan = Mapping[str, Second]  # by tag; AGAIN where a tag is missing


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    counters: "Recomputation",
    plan: Plan,
    skip_dead_gemm: bool = True,
    early_stop: bool = True,
) -> Any:
    """``function(*args)``, whose activations are recomputed in the backward pass instead of kept.

    Args:
        function: with collectives from ``tedlab.comm`` and no other.
        args: its arguments; their gradients flow.
        counters: of the process; see ``Topology.recomputation``.
        plan: what the second pass does at each collective.
        skip_dead_gemm: leave out of the second pass matrix products whose result only feeds a collective that is not
            repeated.
        early_stop: end the second pass as soon as everything that backward needs is there; False repeats all of it, as
            the paper's baseline does.

    Raises:
        RuntimeError: if the second pass meets other collectives than the first, or a kept result was changed in place.
    """
    if torch.compiler.is_compiling():
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, context_fn=_compiled_contexts(plan)
        )
    region = _Region(plan, skip_dead_gemm, counters)
    return torch.utils.checkpoint.checkpoint(
        function,
        *args,
        use_reentrant=False,
        early_stop=early_stop,
        context_fn=lambda: (_Pass(region, second=False), _Pass(region, second=True)),
    )


def _compiled_contexts(plan: Plan) -> Callable[[], Any]:
    """The ``context_fn`` of a region that is checkpointed and compiled: keeps what the plan keeps, and decisions.

    A plan's slices are not known here, only whole results.
    """
    kept = {tag for tag, second in plan.items() if second is Second.WHOLE}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op is torch.ops.tedlab.collective.default and args[3] in kept:
            return CheckpointPolicy.MUST_SAVE
        if op in (torch.ops.aten.topk.default, torch.ops.aten.argmax.default):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


def collective(
    comm: Collectives, tag: str, launch: Callable[[Phase], Tensor], shape: torch.Size, like: Tensor
) -> Tensor:
    """The result of a collective of the forward pass: launched, or in a second pass what the plan says.

    Args:
        comm: the collectives of this process.
        tag: its call site.
        launch: communicates, given the phase.
        shape: of the result.
        like: a tensor with the result's dtype and device.
    """
    region = _now.region
    if region is None:
        return launch("forward")
    if _now.second:
        return region.repeated(comm, tag, launch, shape, like)
    result = launch("forward")
    region.keep_result(comm, tag, result)
    return result


def is_dead(tag: str) -> bool:
    """Whether a matrix product that only feeds the collective ``tag`` need not be computed: its result is not used."""
    region = _now.region
    if region is None or not (_now.second and region.skip_dead_gemm):
        return False
    return region.plan.get(tag, Second.AGAIN) is not Second.AGAIN


def recomputing() -> bool:
    """Whether this thread is in the second pass of a checkpointed region."""
    return _now.region is not None and _now.second


def once(tag: str, compute: Callable[[], Any]) -> Any:
    """What ``compute`` returns, no part of which has a gradient; a second pass takes over what the first computed."""
    region = _now.region
    if region is None:
        return compute()
    if _now.second:
        return region.next_kept(tag)
    result = compute()
    region.keep(tag, result)
    return result


def pin(decision: Tensor) -> Tensor:
    """A decision (an integer tensor) that a second pass takes over from the first; how often it differs is counted."""
    region = _now.region
    if region is None:
        return decision
    if _now.second:
        kept: Tensor = region.next_kept("decision")
        region.counters.count_flips(decision, kept)
        return kept
    region.keep("decision", decision)
    return decision


class Recomputation:
    """What all checkpointed regions of a process have in common: counters.

    Attributes:
        kept_bytes: results of collectives that are kept at present.
        peak_kept_bytes: at most so far.
    """

    def __init__(self) -> None:
        self.kept_bytes = 0
        self.peak_kept_bytes = 0
        self._flips: Tensor | None = None  # on the device, so that counting waits for nothing

    @property
    def flips(self) -> int:
        """Choices that a second pass would have made differently from the first, had they not been pinned."""
        return 0 if self._flips is None else int(self._flips.item())

    def count_flips(self, again: Tensor, kept: Tensor) -> None:
        """Adds the elements in which two decisions differ."""
        flips = (again != kept).sum()
        self._flips = flips if self._flips is None else self._flips + flips

    def count_kept(self, size: int) -> None:
        """Adds bytes; negative when they are freed."""
        self.kept_bytes += size
        self.peak_kept_bytes = max(self.peak_kept_bytes, self.kept_bytes)


class _Region:
    """One checkpointed call: what its first pass keeps for the second, in order."""

    def __init__(self, plan: Plan, skip_dead_gemm: bool, counters: Recomputation) -> None:
        self.plan = plan
        self.skip_dead_gemm = skip_dead_gemm
        self.counters = counters
        self._kept: list[tuple[str, Any, int]] = []  # tag, value, version: a tensor's change in place would show in it
        self._bytes = 0
        self._next = 0

    def __del__(self) -> None:
        self.counters.count_kept(-self._bytes)

    def rewind(self) -> None:
        self._next = 0

    def keep(self, tag: str, value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach()
        self._kept.append((tag, value, _version(value)))

    def next_kept(self, tag: str) -> Any:
        if self._next == len(self._kept) or self._kept[self._next][0] != tag:
            met = self._kept[self._next][0] if self._next < len(self._kept) else "nothing more"
            raise RuntimeError(
                f"a recomputed region came to '{tag}' where its first pass had {met}: whatever decides on collectives "
                "must not change between the two"
            )
        _, value, version = self._kept[self._next]
        if _version(value) != version:
            raise RuntimeError(f"the result of '{tag}', kept for recomputation, was changed in place meanwhile")
        self._next += 1
        # A new tensor: autograd writes on what it is given.
        return value.detach() if isinstance(value, Tensor) else value

    def keep_result(self, comm: Collectives, tag: str, result: Tensor) -> None:
        second = self.plan.get(tag, Second.AGAIN)
        if second is Second.WHOLE:
            self._count(result)
            self.keep(tag, result)
        elif second is Second.SLICE:
            part = result.flatten().chunk(comm.size("tensor"))[comm.rank("tensor")].clone()
            self._count(part)
            self.keep(tag, part)

    def repeated(
        self, comm: Collectives, tag: str, launch: Callable[[Phase], Tensor], shape: torch.Size, like: Tensor
    ) -> Tensor:
        second = self.plan.get(tag, Second.AGAIN)
        if second is Second.AGAIN:
            return launch("recompute")
        if second is Second.NOTHING:
            return unused(shape, like)
        kept: Tensor = self.next_kept(tag)
        if second is Second.SLICE:
            kept = comm.all_gather(kept, "tensor", tag=tag, phase="recompute").view(shape)
        return kept

    def _count(self, kept: Tensor) -> None:
        size = kept.numel() * kept.itemsize
        self._bytes += size
        self.counters.count_kept(size)


def _version(value: Any) -> int:
    return version(value) if isinstance(value, Tensor) else 0


def unused(shape: torch.Size, like: Tensor) -> Tensor:
    """Memory that nobody reads."""
    return like.new_empty(shape)


class _Pass:
    """Within, this thread is in the first or second pass of a region. A second pass comes again if a graph is kept."""

    def __init__(self, region: _Region, second: bool) -> None:
        self.region, self.second = region, second
        self._outside: tuple[_Region | None, bool] = None, False

    def __enter__(self) -> None:
        self._outside = _now.region, _now.second
        _now.region, _now.second = self.region, self.second
        self.region.rewind()

    def __exit__(self, *exception: object) -> None:
        _now.region, _now.second = self._outside


class _Now(threading.local):
    """Where this thread is; on GPUs the second pass runs in a thread of autograd's."""

    region: _Region | None = None
    second: bool = False


_now = _Now()
