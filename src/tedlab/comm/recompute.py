"""Communication-aware activation checkpointing: the paper's CAC (§5.2), and routing that cannot flip.

A checkpointed region runs twice: once without keeping activations, and again in the backward pass. The second pass
repeats the collectives of the first unless their results were kept. A :class:`RecomputePlan` says by tag what it does
at each call site; :func:`tedlab.comm.keep.recompute_plan` makes one. Under any plan, tokens go to the experts of the
first pass (:func:`pin`): recomputed arithmetic may differ in the last bit, but a token must not change its expert.

torch's selective checkpointing could also keep collectives' results, but it intercepts every operation of the region
(which doubles the time of a small eager forward pass) and cannot skip the operations that kept results make
superfluous. Neither matters in a compiled region, which therefore uses it.
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
from tedlab.comm.raw import Wait


class Second(Enum):
    """What the second pass does at a call site."""

    AGAIN = "again"  # it communicates
    WHOLE = "whole"  # it takes the first pass's result, kept whole
    SLICE = "slice"  # it gathers the result, which all tensor ranks hold alike, from the 1/T that each has kept
    NOTHING = "nothing"  # it neither keeps nor communicates the result, which nobody reads


RecomputePlan = Mapping[str, Second]  # by tag; AGAIN where a tag is missing


def recomputed(
    function: Callable[..., Any],
    *args: Any,
    counters: "Recomputation",
    plan: RecomputePlan,
    skip_dead_gemm: bool = True,
    early_stop: bool = True,
) -> Any:
    """Calls ``function(*args)`` and recomputes its activations in the backward pass instead of keeping them.

    Args:
        function: A function whose collectives are all from ``tedlab.comm``.
        args: Its arguments, through which gradients flow.
        counters: The counters of the process, see ``Topology.recomputation``.
        plan: What the second pass does at each collective.
        skip_dead_gemm: Whether the second pass skips matrix products that only feed a collective it does not repeat.
        early_stop: Whether the second pass ends as soon as it has everything that backward needs; False repeats all of
            it, as the paper's baseline does.

    Raises:
        RuntimeError: If the second pass meets other collectives than the first, or a kept result was changed in place.
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


def _compiled_contexts(plan: RecomputePlan) -> Callable[[], Any]:
    """Returns the ``context_fn`` of a compiled region, which keeps routing decisions and the plan's whole results.

    It does not support a plan's slices.
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
    """Returns the result of a forward-pass collective: launches it, or does what the plan says in a second pass.

    Args:
        comm: The collectives of this process.
        tag: The call site.
        launch: Communicates in the given phase and returns the result.
        shape: The shape of the result.
        like: A tensor with the result's dtype and device.
    """

    def launched(phase: Phase) -> Wait:
        result = launch(phase)
        return lambda: result

    return begin(comm, tag, launched, shape, like)()


def begin(comm: Collectives, tag: str, start: Callable[[Phase], Wait], shape: torch.Size, like: Tensor) -> Wait:
    """Begins a :func:`collective` without waiting for it.

    A region must wait for what begins in it, before it ends. A second pass that ends early waits for the rest.

    Args:
        comm: The collectives of this process.
        tag: The call site.
        start: Starts to communicate in the given phase, and returns what waits for the result.
        shape: The shape of the result.
        like: A tensor with the result's dtype and device.

    Returns:
        What waits for the result, once.
    """
    region = _now.region
    if region is None:
        return start("forward")
    return region.again(comm, tag, start, shape, like) if _now.second else region.first(comm, tag, start)


def is_dead(tag: str) -> bool:
    """Returns whether a matrix product that only feeds the collective ``tag`` can be skipped in this pass."""
    region = _now.region
    if region is None or not (_now.second and region.skip_dead_gemm):
        return False
    return region.plan.get(tag, Second.AGAIN) is not Second.AGAIN


def recomputing() -> bool:
    """Returns whether this thread is in the second pass of a checkpointed region."""
    return _now.region is not None and _now.second


def evaluating() -> bool:
    """Returns whether gradients are off, so that no backward pass can follow, as in evaluation and generation.

    Layers then leave out what they do only for one: copies, operations, and functions of their own that choose what is
    kept. What is recorded of training leaves out such passes.
    """
    return not torch.is_grad_enabled()


def once(tag: str, compute: Callable[[], Any]) -> Any:
    """Returns ``compute()``, which must not need gradients; a second pass reuses the first pass's result."""
    region = _now.region
    if region is None:
        return compute()
    if _now.second:
        return region.next_kept(tag)
    result = compute()
    region.keep(tag, result)
    return result


def pin(decision: Tensor) -> Tensor:
    """Returns a decision (an integer tensor), in a second pass that of the first, and counts where the two differ."""
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
    """Counters that all checkpointed regions of a process share.

    Attributes:
        kept_bytes: Bytes of the collectives' results that are kept at present.
        peak_kept_bytes: The largest ``kept_bytes`` so far.
    """

    def __init__(self) -> None:
        self.kept_bytes = 0
        self.peak_kept_bytes = 0
        self._flips: Tensor | None = None  # on the device, so that counting does not synchronise

    @property
    def flips(self) -> int:
        """The number of choices that second passes would have made differently, had they not been pinned."""
        return 0 if self._flips is None else int(self._flips.item())

    def count_flips(self, again: Tensor, kept: Tensor) -> None:
        """Counts the elements in which two decisions differ."""
        flips = (again != kept).sum()
        self._flips = flips if self._flips is None else self._flips + flips

    def count_kept(self, size: int) -> None:
        """Adds ``size`` bytes, which is negative when they are freed."""
        self.kept_bytes += size
        self.peak_kept_bytes = max(self.peak_kept_bytes, self.kept_bytes)


class _Region:
    """One checkpointed call, with what its first pass keeps for the second, in order."""

    def __init__(self, plan: RecomputePlan, skip_dead_gemm: bool, counters: Recomputation) -> None:
        self.plan = plan
        self.skip_dead_gemm = skip_dead_gemm
        self.counters = counters
        self._kept: list[tuple[str, Any, int]] = []  # tag, value, and version, which in-place changes increment
        self._on_their_way: dict[Wait, str] = {}  # what waits for each collective of this pass, and its tag
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
        # detach() makes a new tensor, because autograd sets attributes of the one it is given.
        return value.detach() if isinstance(value, Tensor) else value

    def first(self, comm: Collectives, tag: str, start: Callable[[Phase], Wait]) -> Wait:
        """Starts a collective in the first pass; its result takes its place among what is kept when it arrives."""
        second = self.plan.get(tag, Second.AGAIN)
        wait = self._awaiting(tag, start("forward"))
        if second not in (Second.WHOLE, Second.SLICE):
            return wait
        place = len(self._kept)
        self.keep(tag, None)

        def kept() -> Tensor:
            result = wait()
            part = result
            if second is Second.SLICE:
                part = result.flatten().chunk(comm.size("tensor"))[comm.rank("tensor")].clone()
            self._count(part)
            self._kept[place] = tag, part.detach(), _version(part)
            return result

        return kept

    def again(
        self, comm: Collectives, tag: str, start: Callable[[Phase], Wait], shape: torch.Size, like: Tensor
    ) -> Wait:
        """Does in the second pass what the plan says."""
        second = self.plan.get(tag, Second.AGAIN)
        if second is Second.AGAIN:
            return self._awaiting(tag, start("recompute"))
        if second is Second.NOTHING:
            return lambda: unused(shape, like)
        kept: Tensor = self.next_kept(tag)
        if second is Second.WHOLE:
            return lambda: kept
        gathered = self._awaiting(tag, comm.start_all_gather(kept, "tensor", tag=tag, phase="recompute").wait)
        return lambda: gathered().view(shape)

    def _awaiting(self, tag: str, wait: Wait) -> Wait:
        self._on_their_way[wait] = tag

        def awaited() -> Tensor:
            self._on_their_way.pop(wait, None)
            return wait()

        return awaited

    def end(self, second: bool, complete: bool) -> None:
        """Ends a pass, in which every collective that began must have been awaited.

        Raises:
            RuntimeError: If a complete pass leaves one unawaited.
        """
        left, self._on_their_way = self._on_their_way, {}
        if complete and left:
            raise RuntimeError(
                f"a recomputed region ended before it had awaited what it issued: {', '.join(left.values())}. Await it "
                "in the same region, which repeats both in its second pass"
            )
        if second:  # it ends as soon as it has everything that backward needs; the other processes communicate
            for wait in left:
                wait()

    def _count(self, kept: Tensor) -> None:
        size = kept.numel() * kept.itemsize
        self._bytes += size
        self.counters.count_kept(size)


def _version(value: Any) -> int:
    return version(value) if isinstance(value, Tensor) else 0


def unused(shape: torch.Size, like: Tensor) -> Tensor:
    """Returns uninitialised memory, for a result that nobody reads."""
    return like.new_empty(shape)


class _Pass:
    """A context in which this thread is in a pass of a region. The second pass repeats if the graph is retained."""

    def __init__(self, region: _Region, second: bool) -> None:
        self.region, self.second = region, second
        self._outside: tuple[_Region | None, bool] = None, False

    def __enter__(self) -> None:
        self._outside = _now.region, _now.second
        _now.region, _now.second = self.region, self.second
        self.region.rewind()

    def __exit__(self, *exception: object) -> None:
        _now.region, _now.second = self._outside
        self.region.end(self.second, complete=exception[0] is None)


class _Now(threading.local):
    """The region and pass that this thread is in. On GPUs the second pass runs in one of autograd's threads."""

    region: _Region | None = None
    second: bool = False


_now = _Now()
