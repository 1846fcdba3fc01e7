"""Computes how much of the exchanges with experts hides behind what runs beside them.

That is shared experts and the products of other chunks, or with a shortcut sub-layers; and the router, if tokens leave
before it has chosen.

A sub-layer's kernels hide an exchange, and so do its collectives on other links; those on the same links wait for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from tedlab.comm import Collective, GroupKind, Phase
from tedlab.models.shortcut import ShortcutSpec
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.estimate.passes import BACK, THERE, Passes, experts_of, hidden
from tedlab.predict.volumes import ClosedForm
from tedlab.spec import MicroBatch, Spec, Work

PHASES: tuple[Phase, ...] = ("forward", "recompute", "backward")


@dataclass(frozen=True)
class Sides:
    """One pass of one unit.

    Attributes:
        dispatch, combine: The seconds of both exchanges.
        beside: The seconds of each sub-layer beside them that can hide an exchange.
    """

    dispatch: float
    combine: float
    beside: Sequence[float]

    def hidden(self, slot: int) -> float:
        """Returns the seconds that are hidden if experts compute before the sub-layer of this number."""
        before, after = sum(self.beside[:slot]), sum(self.beside[slot:])
        return min(self.dispatch, before) + min(self.combine, after)


class Hiding:
    """What hides in each unit of a configuration, on a cluster.

    Args:
        form: The closed form of the configuration.
        cluster: The cluster.
        rank: The rank whose groups' places on the nodes count.
    """

    def __init__(self, form: ClosedForm, cluster: ClusterConfig, rank: int = 0) -> None:
        self.form, self.passes = form, Passes(form, cluster, form.layout.groups(rank))

    def seconds(self, block: int, phases: Sequence[Phase] = PHASES) -> float:
        """Returns the seconds that hide in these passes of one micro-batch through the unit at a block."""
        form, unit = self.form, self.form.spec.units[block]
        if form.config.compiles_experts:
            return 0.0
        if not isinstance(unit, ShortcutSpec):
            return sum(hidden(self.passes.unit(block, phase)) for phase in phases) if self._overlaps(block) else 0.0
        if not form.config.comm.overlap_shortcut:
            return 0.0
        return self.at_slot(block, self._chosen(unit), phases)

    def _overlaps(self, block: int) -> bool:
        """Tells whether anything in the layer with experts, if there is one, runs beside its exchanges."""
        found = experts_of(self.form.spec.units[block], self.form.at(block))
        if found is None:
            return False
        layer, layout = found[0], found[0].inside(self.form.layout)
        shared = self.form.config.comm.overlap_shared and layer.shared is not None
        return shared or layer.dispatch.chunks(layout) > 1 or layer.dispatch.gathered(layout)

    def beside(self, micro_batches: int) -> float:
        """Returns the seconds that hide in a step because each backward pass runs beside the next forward pass.

        All but the last do; what hides in that and in the first forward pass by themselves is not counted.

        Args:
            micro_batches: The number of micro-batches of a step.
        """
        forward = self.passes.forward()
        first = hidden(forward, self.passes.backward(adds=False))
        later = micro_batches - 2
        return first + (later * hidden(forward, self.passes.backward(adds=True)) if later else 0.0)

    def at_slot(self, block: int, slot: int, phases: Sequence[Phase] = PHASES) -> float:
        """Returns the seconds that would hide in these passes if experts computed before the sub-layer of this number.

        That is, where they are not compiled.
        """
        return sum(self.sides(block, phase).hidden(slot) for phase in phases)

    def best_slot(self) -> int | None:
        """Returns the ``comm.shortcut_slot`` that hides most in a step, or None if experts run beside nothing.

        If the slot that the configuration has hides as much, it is that one.
        """
        form = self.form
        units = {n: unit for n in form.kinds if isinstance(unit := form.spec.units[n], ShortcutSpec)}
        if not units or not form.config.comm.overlap_shortcut or form.config.compiles_experts:
            return None
        any_unit = next(iter(units.values()))  # the slots of all have the same meaning
        slots = range(any_unit.beside + 1)
        hidden = [sum(len(form.kinds[n]) * self.at_slot(n, slot) for n in units) for slot in slots]
        chosen = self._chosen(any_unit)
        return chosen if hidden[chosen] >= max(hidden) * (1 - 1e-9) else max(slots, key=hidden.__getitem__)

    def _chosen(self, unit: ShortcutSpec) -> int:
        """Returns the number of the sub-layer beside the exchange before which experts compute."""
        config = self.form.config
        return unit.slot(config.comm, config.model.sequence_length) - len(unit.sublayers) + unit.beside

    def sides(self, block: int, phase: Phase) -> Sides:
        """Returns what a pass through the unit at a block communicates, and what can hide that."""
        unit, b, backward = self.form.spec.units[block], self.form.at(block), phase == "backward"
        assert isinstance(unit, ShortcutSpec)
        calls = [call for call in self.form.block(block) if call.phase == phase]
        dispatch, combine = self._both_ways(calls)
        return Sides(dispatch, combine, [self._hides(*part, b, backward) for part in unit.sublayers[-unit.beside :]])

    def _both_ways(self, calls: Sequence[Collective]) -> tuple[float, float]:
        """Returns the seconds of the exchanges with experts, there and back."""
        there, back = (sum(self.passes.taken(call) for call in calls if call.tag in tags) for tags in (THERE, BACK))
        return there, back

    def _hides(self, norm: Spec, layer: Spec, b: MicroBatch, backward: bool) -> float:
        works = (part.backward(b) if backward else part.forward(b) for part in (norm, layer))
        return self._hiding(chain(*works), layer, b, backward)

    def _hiding(self, works: Iterable[Work], layer: Spec, b: MicroBatch, backward: bool) -> float:
        """Returns the seconds of kernels, and of a layer's collectives on other links than exchanges."""
        total = self.passes.total(works)
        sites = layer.sites(b.layout).present(b.layout)
        calls = self.form.calls(sites.backward if backward else sites.forward, "forward", b.rows)
        return total + sum(self.passes.taken(call) for call in calls if not self.shares_link(call.kind))

    def shares_link(self, kind: GroupKind) -> bool:
        """Returns whether the collectives of a kind of group use the same links as exchanges with experts."""
        return self.passes.link(kind) == self.passes.link("expert")
