"""The memory while the backward pass of a micro-batch runs beside the forward pass of the next (``comm.interleave``).

The passes take turns at their exchanges with experts, however long these take: after the forward pass has come to its
k-th wait, the backward pass runs up to its own. So for each part of one it is known what the other holds meanwhile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from tedlab.comm import Phase
from tedlab.models.shortcut import ShortcutSpec
from tedlab.moe import MoESpec
from tedlab.moe.shared import SharedSpec
from tedlab.nn import FeedForwardSpec
from tedlab.predict.estimate.passes import exchanges, experts_of
from tedlab.spec import MicroBatch, WorkingSet

if TYPE_CHECKING:
    from tedlab.predict.estimate.memory import Memory, Moment


class Held(NamedTuple):
    """Bytes that a pass holds, by category."""

    gradients: float = 0.0
    stash: float = 0.0
    activations: float = 0.0
    temporaries: float = 0.0


@dataclass
class Stretch:
    """What a pass does between two of its waits.

    Attributes:
        moments: What it holds when that is much, each with a name.
        waiting: What it holds at the wait that ends it, or when the pass has ended.
    """

    moments: list[tuple[str, Held]] = field(default_factory=list)
    waiting: Held = field(default_factory=Held)


class Beside:
    """The memory of a forward pass and of the backward pass of the micro-batch before, which take turns.

    Args:
        memory: The memory of the rank.
    """

    def __init__(self, memory: "Memory") -> None:
        self.memory, self.form, self.spec = memory, memory.form, memory.form.spec
        self.waits, self.made = cache(self._waits), cache(self._made)
        self.moments_of = cache(self._moments_of)
        # From the third pair on there are sums of earlier micro-batches' gradients.
        self.adds = memory.accumulated > 2
        self.sums = memory.gradients if self.adds else 0
        ends = self.form.at()
        freed = self.spec.freed_after_loss(ends)
        self.left = Held(0, memory.stash[-1], memory.saved[-1] + memory.last - freed)  # by a forward pass

    def moments(self) -> Iterator["Moment"]:
        """Yields the moments that can be the fullest."""
        forward, backward = self._forward(), self._backward()
        before = self.left._replace(gradients=self.sums)

        def together(name: str, held: Held, other: Held) -> "Moment":
            return self.memory.moment(f"{name}, beside another micro-batch", *map(sum, zip(held, other, strict=True)))

        for turn in range(max(len(forward), len(backward))):
            if turn < len(forward):
                waiting = before if turn == 0 else backward[min(turn, len(backward)) - 1].waiting
                for name, held in forward[turn].moments:
                    yield together(name, held, waiting)
            if turn < len(backward):
                waiting = forward[min(turn, len(forward) - 1)].waiting
                for name, held in backward[turn].moments:
                    yield together(name, held, waiting)

    def _forward(self) -> list[Stretch]:
        memory, found = self.memory, [Stretch()]
        for n, first in enumerate(self.form.firsts):
            for tag in self.waits(first, "forward"):
                held = found[-1].waiting = self._waiting(n, tag, "forward")
                if memory.recomputed:
                    # What experts make is there until they have their results, and what runs beside these comes after.
                    made = self._made_by_experts(first) if _arrived(tag) else 0
                    more = max(made, self._computing_beside(first))
                    held = held._replace(temporaries=held.temporaries + more)
                if n in (self.form.moved or ()):
                    held = held._replace(temporaries=max(held.temporaries, memory.passing(n)))
                found[-1].moments.append((f"forward pass of block {n}", held))
                found.append(Stretch())
        at_loss = self.spec.at_loss(self.form.at())
        found[-1].moments.append(("loss", Held(0, memory.stash[-1], memory.saved[-1] + memory.last, at_loss)))
        found[-1].waiting = self.left
        return found

    def _backward(self) -> list[Stretch]:
        memory, ends, found = self.memory, self.form.at(), [Stretch()]
        gradients = self.sums + self.spec.left(ends, self.adds)

        def wait(n: int, tag: str, phase: Phase) -> None:
            held = self._waiting(n, tag, phase)
            found[-1].waiting = held._replace(gradients=gradients, temporaries=held.temporaries + memory.stream)
            found.append(Stretch())

        def note(n: int, moments: Sequence[WorkingSet]) -> None:
            activations = memory.saved[n + 1] + (memory.saves[n] if memory.recomputed else 0)
            for moment in moments:
                new = gradients + moment.new + (0 if self.adds else moment.done)
                more = moment.temporaries + 2 * memory.stream
                held = Held(new, memory.stash[n + 1], activations - moment.freed, more)
                found[-1].moments.append((f"backward pass of block {n}, {moment.name}", held))

        for n, first in reversed([*enumerate(self.form.firsts)]):
            before, between, after = self.moments_of(first)
            for tag in self.waits(first, "recompute"):
                wait(n, tag, "recompute")
            note(n, before)
            waits = self.waits(first, "backward")
            for number, tag in enumerate(waits, 1):
                wait(n, tag, "backward")
                if number == sum(map(_arrived, waits)):  # these come first: all gradients of results are here
                    note(n, between)
            note(n, after)
            gradients += 0 if self.adds else memory.own[n]
        end = self.spec.first_moment(ends, self.adds)
        held = Held(memory.gradients + end.new, temporaries=end.temporaries + 2 * memory.stream)
        found[-1].moments.append((end.name, held))
        found[-1].waiting = Held(memory.gradients)
        return found

    # ---- a unit, by the first block that is like it ----------------------------------------------------------------

    def _moments_of(self, block: int) -> tuple[list[WorkingSet], ...]:
        """Returns the moments of a backward pass before, between and after its exchanges with experts."""
        unit, b, recomputed = self.spec.units[block], self.form.at(block), self.memory.recomputed
        moments, found = [*unit.working_sets(b, recomputed)], experts_of(unit, b)
        if found is None:
            return [], [], moments
        layer, routed = found
        inside = {moment.name for moment in layer.routed_alone.working_sets(routed, recomputed)}
        places = [place for place, moment in enumerate(moments) if moment.name in inside]
        start, stop = places[0], places[-1] + 1
        return moments[:start], moments[start:stop], moments[stop:]

    def _waits(self, block: int, phase: Phase) -> list[str]:
        """Returns the tags of the exchanges for which a pass waits, in their order."""
        found = experts_of(self.spec.units[block], self.form.at(block))
        if found is None:
            return []
        there, back = exchanges(found[0], self.form.layout)
        calls = self.form.block(block)
        return [call.tag for call in calls if call.phase == phase and call.tag in (*there, *back)]

    def _made(self, block: int, arrived: bool, backward: bool) -> tuple[int, int]:
        """Returns the bytes that a pass has saved, or has not freed yet, when it waits, and those on their way.

        Args:
            block: The block.
            arrived: Whether tokens have arrived at experts, so that it waits for results (or has their gradients).
            backward: Whether it is the backward pass.
        """
        unit, b = self.spec.units[block], self.form.at(block)
        found = experts_of(unit, b)
        assert found is not None
        layer, routed = found
        made = self.memory.saves[block] - layer.saved_later(routed, arrived)
        if isinstance(unit, ShortcutSpec):
            made -= self._sublayers_later(unit, b, arrived, backward)
        elif layer.shared is not None:
            made -= self._shared_later(layer, layer.shared, routed, arrived, backward)
        return made, (b.rows.sent + b.rows.received) * layer.hidden * b.compute.itemsize

    def _sublayers_later(self, unit: ShortcutSpec, b: MicroBatch, arrived: bool, backward: bool) -> int:
        """Returns what sub-layers save after a wait, or have freed before one of a backward pass."""
        options, number = b.layout.options, len(unit.sublayers)
        reads, start = number - unit.beside, unit.slot(options, b.length)
        if options.overlap_shortcut and arrived != backward:
            start = number if arrived else reads
        later = unit.sublayers[start:]  # the norm of the first of these is on the other side of the wait
        total = sum(inner.saved(b) for _, inner in later) + sum(norm.saved(b) for norm, _ in later[1:])
        return total - (unit.experts.read_twice(b) if start <= reads else 0)

    def _shared_later(self, layer: MoESpec, shared: SharedSpec, b: MicroBatch, arrived: bool, backward: bool) -> int:
        """Returns what shared experts save after a wait, or have freed before one of a backward pass."""
        if not b.layout.options.overlap_shared or (backward and not arrived):
            return shared.saved(b) - layer.read_twice(b)
        gate = 0 if shared.gate is None else shared.gate.saved(b)
        if backward:
            return shared.down.saved(b) + gate
        return 0 if arrived else gate  # what the first half has made is already there for the second

    def _made_by_experts(self, block: int) -> int:
        """Returns the bytes that routed experts save between their tokens' arrival and their results'."""
        found = experts_of(self.spec.units[block], self.form.at(block))
        assert found is not None
        layer, routed = found
        return layer.saved_later(routed, False) - layer.saved_later(routed, True)

    def _computing_beside(self, block: int) -> int:
        """Returns the most bytes of what computes beside an exchange in a forward pass that keeps nothing."""
        unit, b = self.spec.units[block], self.form.at(block)
        if not isinstance(unit, ShortcutSpec) or not b.layout.options.overlap_shortcut:
            return 0
        # The tokens that experts read, and the last result; of the widest layer its features, its product, and, if
        # tensor ranks add theirs, a copy and their sum.
        inner = [layer for _, layer in unit.sublayers[-unit.beside :] if isinstance(layer, FeedForwardSpec)]
        features = max(layer.ffn for layer in inner) * b.tokens // b.tensor * b.compute.itemsize
        return features + (5 if b.tensor > 1 else 3) * self.memory.stream

    def _waiting(self, n: int, tag: str, phase: Phase) -> Held:
        """Returns what a pass holds while it waits for an exchange of a block, but for gradients of a backward pass."""
        memory, arrived = self.memory, _arrived(tag)
        made, on_their_way = self.made(self.form.firsts[n], arrived, phase == "backward")
        if memory.recomputed and phase == "forward":  # what the block makes is not kept
            kept = memory.stash[n + arrived]
            return Held(0, kept, memory.saved[n + 1], 2 * memory.stream + on_their_way)
        before = memory.saved[n + 1] if memory.recomputed else memory.saved[n]
        return Held(0, memory.stash[n + 1], before + made, on_their_way)


def _arrived(tag: str) -> bool:
    """Tells whether an exchange is one of results, which experts have when their tokens have arrived."""
    return tag.startswith("combine.")
