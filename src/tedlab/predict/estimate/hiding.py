"""Computes how much of the exchanges of shortcut-connected experts hides behind the sub-layers beside them.

A sub-layer's kernels hide an exchange, and so do its collectives on other links; those on the same links wait for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from tedlab.comm import Collective, GroupKind, Phase
from tedlab.models.shortcut import ShortcutSpec
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.cost import LinkClass, collective_seconds, link_of
from tedlab.predict.sim.roofline import seconds
from tedlab.predict.volumes import ClosedForm
from tedlab.spec import MicroBatch, Spec

EXCHANGES = ("dispatch.all_to_all", "combine.all_to_all")
BETWEEN_NODES = ("dispatch.between_nodes", "combine.between_nodes")  # what of them is under way if there are two steps


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
        self.form, self.cluster = form, cluster
        self.members: Mapping[GroupKind, Sequence[int]] = form.layout.groups(rank)

    def seconds(self, block: int) -> float:
        """Returns the seconds that hide in all passes of one micro-batch through the unit at a block."""
        form, unit = self.form, self.form.spec.units[block]
        if not isinstance(unit, ShortcutSpec) or not form.config.comm.overlap_shortcut:
            return 0.0
        return self.at_slot(block, self._chosen(unit))

    def at_slot(self, block: int, slot: int) -> float:
        """Returns the seconds that would hide in all passes if experts computed before the sub-layer of this number."""
        return sum(self.sides(block, phase).hidden(slot) for phase in ("forward", "recompute", "backward"))

    def best_slot(self) -> int | None:
        """Returns the ``comm.shortcut_slot`` that hides most in a step, or None if experts run beside nothing.

        If the slot that the configuration has hides as much, it is that one.
        """
        form = self.form
        units = {n: unit for n in form.kinds if isinstance(unit := form.spec.units[n], ShortcutSpec)}
        if not units or not form.config.comm.overlap_shortcut:
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
        dispatch, combine = (
            sum(self._taken(call) for call in calls if call.tag in tags)
            for tags in zip(EXCHANGES, BETWEEN_NODES, strict=True)
        )
        return Sides(dispatch, combine, [self._hides(*part, b, backward) for part in unit.sublayers[-unit.beside :]])

    def _hides(self, norm: Spec, layer: Spec, b: MicroBatch, backward: bool) -> float:
        works = (part.backward(b) if backward else part.forward(b) for part in (norm, layer))
        total = sum(seconds(work, self.cluster) for work in chain(*works))
        sites = layer.sites(b.layout).present(b.layout)
        calls = self.form.calls(sites.backward if backward else sites.forward, "forward", b.rows)
        return total + sum(self._taken(call) for call in calls if self._link(call.kind) != self._link("expert"))

    def _link(self, kind: GroupKind) -> LinkClass:
        return link_of(self.members[kind], self.cluster.gpus_per_node)

    def _taken(self, call: Collective) -> float:
        return collective_seconds(call.op, call.even_payload_bytes, self.members[call.kind], self.cluster)
