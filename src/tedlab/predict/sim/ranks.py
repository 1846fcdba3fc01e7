"""Which ranks of a world differ from each other."""

import math

from tedlab.degrees import ParallelDegrees
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.cost import placement_of
from tedlab.predict.sim.routing import Routing


def kinds_of_ranks(
    degrees: ParallelDegrees, cluster: ClusterConfig, routing: Routing | None = None
) -> dict[int, list[int]]:
    """All ranks, by the first one of their kind.

    Ranks hold, compute and exchange alike, but for two things: where their groups lie on the cluster's nodes, if nodes
    cannot be divided into tensor groups, and how many rows without a capacity a ``routing`` sends to their experts. (Of
    these, tensor ranks of one group that divide them differ by one of each sender at most, and count as alike.)
    """
    rows = [()] * degrees.expert if routing is None else [*map(tuple, routing.rows_by_expert_rank().T)]
    kinds: dict[tuple[object, ...], list[int]] = {}
    # From then on groups lie on other nodes, but as before.
    period = min(math.lcm(degrees.tensor * degrees.expert, cluster.gpus_per_node), degrees.world_size)
    for rank in range(period):
        places = tuple(placement_of(group, cluster.gpus_per_node) for group in degrees.groups(rank).values())
        kinds.setdefault((places, rows[rank // degrees.tensor % degrees.expert]), []).extend(
            range(rank, degrees.world_size, period)
        )
    return {ranks[0]: sorted(ranks) for ranks in kinds.values()}
