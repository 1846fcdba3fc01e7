"""Finds the ranks of a world that differ from each other."""

import math

from tedlab.config import Order
from tedlab.degrees import ParallelDegrees
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.cost import placement_of
from tedlab.predict.sim.routing import SimulatedRouting


def kinds_of_ranks(
    degrees: ParallelDegrees, cluster: ClusterConfig, routing: SimulatedRouting | None = None
) -> dict[int, list[int]]:
    """Returns all ranks, by the first one of their kind.

    Ranks hold, compute and exchange the same, except for two things: where their groups lie on the cluster's nodes, if
    a node does not divide into tensor groups, and how many rows a ``routing`` sends to their experts if these have no
    capacity. (Tensor ranks that divide such rows differ by at most one row from each sender, and count as equal.)
    """
    rows: list[tuple[object, ...]] = [()] * degrees.expert if routing is None else routing.kinds_by_expert_rank()
    kinds: dict[tuple[object, ...], list[int]] = {}
    # After a period, groups lie on other nodes in the same way.
    block = degrees.world_size // degrees.expert_data if degrees.order == Order.EXPERT else degrees.world_size
    period = min(math.lcm(block, degrees.tensor, cluster.gpus_per_node), degrees.world_size)
    for rank in range(period):
        places = tuple(placement_of(group, cluster.gpus_per_node) for group in degrees.groups(rank).values())
        kinds.setdefault((places, rows[degrees.coordinates(rank)["expert"]]), []).extend(
            range(rank, degrees.world_size, period)
        )
    return {ranks[0]: sorted(ranks) for ranks in kinds.values()}
