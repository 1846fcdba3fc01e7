"""Which experts a layer without a capacity has: that depends on where they are, and on what is sent."""

from tedlab.config import Dedup
from tedlab.degrees import ParallelDegrees
from tedlab.moe.experts import Experts, ExpertsSpec, RowExperts, mixtures
from tedlab.moe.gathered import GatheredExperts
from tedlab.moe.local import LocalExperts
from tedlab.moe.local_spec import DroplessSpec
from tedlab.moe.pilots import PilotExperts
from tedlab.topology import Topology


@mixtures.register("dropless")
class Dropless(RowExperts):
    """Makes :class:`LocalExperts` if all experts are in each process, otherwise what ``comm.dedup`` asks for."""

    dispatch = DroplessSpec
    sends_pilots = True

    @classmethod
    def make(cls, spec: ExpertsSpec, topology: Topology) -> Experts:
        if cls.alone(topology.degrees):
            return LocalExperts(spec, topology)
        made = {Dedup.NONE: RowExperts, Dedup.GROUP: GatheredExperts}.get(Dedup(topology.options.dedup), PilotExperts)
        return made(spec, topology)

    @classmethod
    def alone(cls, degrees: ParallelDegrees) -> bool:
        return degrees.expert == 1 and not degrees.folded
