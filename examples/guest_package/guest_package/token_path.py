"""Two token paths: every tensor rank exchanges all slots, or all rows, whether or not ``comm.dtd`` asks for less."""

from dataclasses import replace

from tedlab.degrees import ParallelDegrees
from tedlab.moe import (
    AllToAllPath,
    DispatchSpec,
    ExpertsSpec,
    RaggedPath,
    ReplicatedRows,
    ReplicatedSlots,
    RowExperts,
    SlotExperts,
    mixtures,
)
from tedlab.spec import Layout
from tedlab.topology import Topology


class PlainSpec(DispatchSpec):
    """Their collectives, rows and kernels: those of tedlab's own paths without DTD."""

    def check(self, degrees: ParallelDegrees) -> None:
        if degrees.sequence:
            raise ValueError(f"moe.dispatch={self.config.dispatch} needs parallel.sequence=false")

    def obeyed(self, layout: Layout) -> Layout:
        return replace(layout, options=replace(layout.options, dtd=False))


@mixtures.register("guest_plain")
class PlainSlots(SlotExperts):
    """``moe.dispatch=guest_plain``: experts with a capacity."""

    dispatch = PlainSpec

    def __init__(self, spec: ExpertsSpec, topology: Topology) -> None:
        super().__init__(spec, topology)
        self.path, self.region = AllToAllPath(spec.num_experts, topology), ReplicatedSlots(topology.comm)


@mixtures.register("guest_plain_rows")
class PlainRows(RowExperts):
    """``moe.dispatch=guest_plain_rows``: experts that take all tokens that choose them."""

    dispatch = PlainSpec

    def __init__(self, spec: ExpertsSpec, topology: Topology) -> None:
        super().__init__(spec, topology)
        layout = PlainSpec(spec.hidden, spec.config).obeyed(topology.layout)
        self.path = RaggedPath(spec.num_experts, topology, self.widths, chunks=layout.chunks, layout=layout)
        self.region = ReplicatedRows(topology.comm)
