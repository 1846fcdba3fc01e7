"""A token path: every tensor rank exchanges all slots, whether or not ``comm.dtd`` asks for less."""

from dataclasses import replace

from tedlab.comm.rows import Rows
from tedlab.moe import AllToAllPath, DispatchSpec, ExpertsSpec, ReplicatedSlots, SlotExperts, mixtures
from tedlab.spec import Layout, Sites
from tedlab.topology import Topology


class PlainSpec(DispatchSpec):
    """Its collectives: those of tedlab's own paths without DTD."""

    def sites(self, layout: Layout) -> Sites:
        return super().sites(replace(layout, options=replace(layout.options, dtd=False)))

    def rows(self, layout: Layout, tokens: int) -> Rows:
        return super().rows(replace(layout, options=replace(layout.options, dtd=False)), tokens)


@mixtures.register("guest_plain")
class PlainExperts(SlotExperts):
    """``moe.dispatch=guest_plain``."""

    dispatch = PlainSpec

    def __init__(self, spec: ExpertsSpec, topology: Topology) -> None:
        if topology.sequence_sharded:
            raise ValueError("moe.dispatch=guest_plain needs parallel.sequence=false")
        super().__init__(spec, topology)
        self.path, self.region = AllToAllPath(spec.num_experts, topology), ReplicatedSlots(topology.comm)
