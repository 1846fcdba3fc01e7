"""What a process does in a pass, step by step, and how long passes take: alone, or two that take turns.

The processor does one thing at a time, and so does each class of links, which serves collectives in the order in which
they are issued. A pass gives its turn to the other one where it awaits an exchange (``comm/turns.py``).
"""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Literal, NamedTuple

from tedlab.comm import Collective, GroupKind, Phase
from tedlab.config import Granularity
from tedlab.models import BlockSpec
from tedlab.models.double_gate import DoubleGatedSpec
from tedlab.models.joined import JoinedSpec
from tedlab.models.shortcut import ShortcutSpec
from tedlab.moe import MoESpec
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.cost import LinkClass, collective_seconds, link_of
from tedlab.predict.sim.roofline import seconds
from tedlab.predict.volumes import ClosedForm
from tedlab.spec import Layout, MicroBatch, Spec, Work

# The exchanges with experts that are issued and awaited separately: there (of two steps, the first), and back.
THERE = ("dispatch.all_to_all", "dispatch.all_gather", "dispatch.between_nodes")
BACK = ("combine.all_to_all", "combine.reduce_scatter", "combine.between_nodes")


class Step(NamedTuple):
    """Something that a pass does.

    Attributes:
        what: Whether it computes, communicates and waits for that, issues a collective, or awaits the first of those
            that it has issued and not awaited yet.
        seconds: How long that takes by itself.
        link: The class of links that communicate.
    """

    what: Literal["compute", "communicate", "issue", "await"]
    seconds: float = 0.0
    link: LinkClass | None = None


AWAIT = Step("await")


def alone(steps: Iterable[Step]) -> float:
    """Returns the seconds that steps take one after the other."""
    return sum(step.seconds for step in steps)


def elapsed(*passes: Sequence[Step]) -> float:
    """Returns the seconds after which all passes have ended, of which the first begins."""
    now, free = 0.0, dict.fromkeys(("in_node", "between_nodes"), 0.0)

    def run(steps: Sequence[Step]) -> Iterator[None]:
        nonlocal now
        under_way: deque[float] = deque()
        for what, taken, link in steps:
            if what == "compute":
                now += taken
            elif what == "await":
                yield
                now = max(now, under_way.popleft())
            else:
                assert link is not None
                free[link] = max(now, free[link]) + taken
                if what == "issue":
                    under_way.append(free[link])
                else:
                    now = free[link]

    turns = deque(map(run, passes))
    while turns:
        running = turns.popleft()
        for _ in running:
            turns.append(running)
            break
    return now


def hidden(*passes: Sequence[Step]) -> float:
    """Returns how many seconds sooner passes end than if everything waited for what came before; negative: later."""
    return sum(map(alone, passes)) - elapsed(*passes)


class Part(NamedTuple):
    """What runs between two exchanges or beside one.

    Attributes:
        kernels: Its kernels in this pass.
        layer: Whose collectives these are; None: it has none.
    """

    kernels: Iterable[Work]
    layer: Spec | None = None


class Arrangement(NamedTuple):
    """What a unit with experts runs around and beside their exchanges, in the order of the forward pass."""

    before: Sequence[Part] = ()
    beside_there: Sequence[Part] = ()
    beside_back: Sequence[Part] = ()
    after: Sequence[Part] = ()

    @property
    def mirrored(self) -> "Arrangement":
        """The order of the backward pass."""
        return Arrangement(*(part[::-1] for part in reversed(self)))


class Passes:
    """The passes of one micro-batch.

    Args:
        form: The closed form of the configuration.
        cluster: The cluster.
        members: The global ranks of the process's group of each kind.
    """

    def __init__(self, form: ClosedForm, cluster: ClusterConfig, members: Mapping[GroupKind, Sequence[int]]) -> None:
        self.form, self.cluster, self.members = form, cluster, members
        self.unit = cache(self._unit)

    def forward(self) -> list[Step]:
        """Returns the steps of the forward pass."""
        first, last = self._ends
        units = (self.unit(block, "forward") for block in self.form.firsts)
        return [*self._parts(first, "forward"), *chain.from_iterable(units), *self._parts(last, "forward")]

    def backward(self, adds: bool) -> list[Step]:
        """Returns the steps of the backward pass, with the second forward pass of each unit before its own.

        Args:
            adds: Whether gradients are added to those of earlier micro-batches.
        """
        first, last = self._ends
        steps = self._parts(last[::-1], "backward")
        recomputed = self.form.config.model.recompute.granularity == Granularity.BLOCK
        for block in reversed(self.form.firsts):
            steps += self.unit(block, "recompute") if recomputed else ()
            steps += self.unit(block, "backward")
            steps += [self._added(self.form.spec.units[block])] if adds else ()
        steps += self._parts(first[::-1], "backward")
        return [*steps, *(self._added(part) for part in (*first, *last) if adds)]

    @property
    def _ends(self) -> tuple[list[Spec], list[Spec]]:
        spec = self.form.spec
        first: list[Spec] = [part for part in (spec.embedding, spec.positions) if part is not None]
        return first, [*spec.ends[len(first) :]]

    def _parts(self, layers: Sequence[Spec], phase: Phase) -> list[Step]:
        """Returns the steps of layers before or after all blocks."""
        b, steps, backward = self.form.at(), [], phase == "backward"
        for layer in layers:
            sites = layer.sites(b.layout).present(b.layout)
            calls = [*self.form.calls(sites.backward if backward else sites.forward, phase, b.rows)]
            steps += self._in_place(self.total(layer.backward(b) if backward else layer.forward(b)), calls)
        return steps

    def _added(self, layer: Spec) -> Step:
        size = 3 * layer.gradients(self.form.at())
        return Step("compute", seconds(Work(0, size, self.form.precise, "arithmetic"), self.cluster))

    # ---- a unit --------------------------------------------------------------------------------------------------

    def _unit(self, block: int, phase: Phase) -> list[Step]:
        """Returns the steps of the unit at a block in a phase of its passes."""
        form, unit, b = self.form, self.form.spec.units[block], self.form.at(block)
        backward, again = phase == "backward", phase == "recompute"
        dead: Collection[str] = form.dead(block) if again else ()
        stop = again and form.config.model.recompute.early_stop
        total = self.total(unit.backward(b) if backward else unit.forward(b, dead, stop))
        calls = [call for call in form.block(block) if call.phase == phase]
        found = experts_of(unit, b)
        if found is None:
            return self._in_place(total, calls)
        assert isinstance(unit, BlockSpec | JoinedSpec)
        layer, within = found[0], found[0].within(found[1])
        around = self._arranged(unit, layer, b, backward, dead, stop)
        around = around.mirrored if backward else around
        runs = [[self._part(part, b, backward, calls) for part in parts] for parts in around]
        stages = layer.backward_stages(within) if backward else layer.stages(within, dead, stop)
        before, beside_there, beside_back, after = (list(chain(*parts)) for parts in runs)
        computing = [self.total(stage) for stage in stages]
        there, experts, back = self._exchanging(layer, within, backward, computing, calls)
        rest = total - sum(s.seconds for s in chain(before, beside_there, beside_back, after) if s.what == "compute")
        before.append(Step("compute", max(rest - sum(computing), 0.0)))  # residuals, and what shared experts add
        return [*before, *there, *beside_there, *experts, *beside_back, *back, *after]

    def _arranged(
        self,
        unit: BlockSpec | JoinedSpec,
        layer: MoESpec,
        b: MicroBatch,
        backward: bool,
        dead: Collection[str],
        stop: bool,
    ) -> Arrangement:
        """Returns what runs around the exchanges of a unit with experts, in the order of the forward pass."""
        comm, length = self.form.config.comm, self.form.config.model.sequence_length

        def sublayer(norm: Spec, inner: Spec | None) -> Part:
            layers = [norm] if inner is None else [norm, inner]
            if backward:
                return Part(chain(*(one.backward(b) for one in reversed(layers))), inner)
            return Part(chain(*(one.forward(b, dead) for one in layers)), inner)

        if isinstance(unit, ShortcutSpec):
            parts = [sublayer(*one) for one in unit.sublayers]
            slot, reads = unit.slot(comm, length), len(parts) - unit.beside
            if comm.overlap_shortcut:
                return Arrangement(parts[:reads], parts[reads:slot], parts[slot:])
            return Arrangement(parts[:slot], after=parts[slot:])
        before: list[Part] = []
        for block in unit.blocks if isinstance(unit, JoinedSpec) else (unit,):
            before.append(sublayer(block.norm1, block.attention))
            dense = block.feed_forward if block.moe is None else None
            before.append(sublayer(block.norm2, dense))
        shared = layer.shared
        if shared is None:
            return Arrangement(before)
        if not comm.overlap_shared:
            works = shared.backward(b) if backward else shared.forward(b, dead, stop)
            return Arrangement(before, after=[Part(works, shared)])
        halves = zip(shared.halves(b, backward), (shared.up, shared.down), strict=True)
        first, second = ([Part(works, half)] for works, half in halves)
        return Arrangement(before, first, second)

    def _part(self, part: Part, b: MicroBatch, backward: bool, calls: list[Collective]) -> list[Step]:
        """Returns the steps of a part, whose collectives it takes from those that are left."""
        own = []
        if part.layer is not None:
            sites = part.layer.sites(b.layout).present(b.layout)
            wanted = Counter(site.tag for site in (sites.backward if backward else sites.forward))
            for call in [*calls]:
                if wanted[call.tag]:
                    wanted[call.tag] -= 1
                    calls.remove(call)
                    own.append(call)
        return self._in_place(self.total(part.kernels), own)

    def _exchanging(
        self, layer: MoESpec, b: MicroBatch, backward: bool, stages: Sequence[float], calls: Sequence[Collective]
    ) -> tuple[list[Step], list[Step], list[Step]]:
        """Returns the steps of routed experts until tokens have left, until the last results have, and from then on."""
        outward, homeward = (BACK, THERE) if backward else (THERE, BACK)
        second = {*chain(*exchanges(layer, b.layout))}.difference(THERE, BACK)
        out: list[Collective] = []
        home: list[Collective] = []
        others: tuple[list[Collective], ...] = ([], [], [])
        for call in calls:
            if call.tag in outward:
                out.append(call)
            elif call.tag in homeward:
                home.append(call)
            else:
                others[2 if home else 1 if out else 0].append(call)
        before, computing, after = stages
        there: list[Step] = []
        experts: list[Step] = []
        back: list[Step] = []
        if layer.dispatch.gathered(b.layout):  # tokens leave before the router has chosen
            router = self.total(layer.router.backward(b) if backward else layer.router.forward(b))
            before, after = (before, after - router) if backward else (before - router, after)
            (back if backward else experts).append(Step("compute", router))
        there += [*self._in_place(before, others[0]), *(self._step(call, "issue") for call in out)]
        chunks = max(len(out), len(home), 1)
        late = ("dispatch." if backward else "combine.",)
        for n in range(chunks):
            experts += [AWAIT] if out else []
            inner = _of_chunk(others[1], n, chunks)
            last = [call for call in inner if call.op in ("all_reduce", "reduce_scatter") or call.tag.startswith(late)]
            steps = {
                call: [self._step(call, "issue"), AWAIT] if call.tag in second else [self._step(call)] for call in inner
            }
            experts += chain.from_iterable(steps[call] for call in inner if call not in last)
            experts += [Step("compute", computing / chunks), *chain.from_iterable(steps[call] for call in last)]
            experts += [self._step(call, "issue") for call in home[n : n + 1]]
        back += [*[AWAIT] * len(home), *self._in_place(after, others[2])]
        return there, experts, back

    # ---- seconds -------------------------------------------------------------------------------------------------

    def _in_place(self, computing: float, calls: Sequence[Collective]) -> list[Step]:
        """Returns kernels between collectives that they wait for (gathers) and those that wait for them (others)."""
        gathers = [call for call in calls if call.op == "all_gather"]
        rest = [call for call in calls if call.op != "all_gather"]
        return [*map(self._step, gathers), Step("compute", computing), *map(self._step, rest)]

    def _step(self, call: Collective, what: Literal["communicate", "issue"] = "communicate") -> Step:
        return Step(what, self.taken(call), self.link(call.kind))

    def taken(self, call: Collective) -> float:
        """Returns the seconds of a collective."""
        return collective_seconds(call.op, call.even_payload_bytes, self.members[call.kind], self.cluster)

    def link(self, kind: GroupKind) -> LinkClass:
        """Returns the slowest links between the members of a kind of group."""
        return link_of(self.members[kind], self.cluster.gpus_per_node)

    def total(self, works: Iterable[Work]) -> float:
        """Returns the seconds of kernels one after the other."""
        return sum(seconds(work, self.cluster) for work in works)


def experts_of(unit: Spec, b: MicroBatch) -> tuple[MoESpec, MicroBatch] | None:
    """Returns the experts of a unit and what they compute with, outside of their region; None: it has none."""
    if isinstance(unit, JoinedSpec):
        return unit.experts, unit.twice(b) if isinstance(unit, DoubleGatedSpec) else b
    layer = unit.feed_forward if isinstance(unit, BlockSpec) else None
    return (layer, b) if isinstance(layer, MoESpec) else None


def exchanges(layer: MoESpec, layout: Layout) -> tuple[Sequence[str], Sequence[str]]:
    """Returns the tags of the exchanges, there and back, that a pass issues and awaits: all steps of pilots."""
    if layer.dispatch.pilots(layer.inside(layout)):
        return (*THERE, "dispatch.in_node"), (*BACK, "combine.in_node")
    return THERE, BACK


def _of_chunk(calls: Sequence[Collective], chunk: int, chunks: int) -> list[Collective]:
    """Returns those of a chunk; a collective that is not divided belongs to the first."""
    by_tag: dict[str, list[Collective]] = {}
    for call in calls:
        by_tag.setdefault(call.tag, []).append(call)
    found: list[Collective] = []
    for alike in by_tag.values():
        if len(alike) == chunks:
            found.append(alike[chunk])
        elif chunk == 0:
            found += alike
    return found
