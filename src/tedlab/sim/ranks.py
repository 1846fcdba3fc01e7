"""Which ranks of a world differ from each other."""

from tedlab.cluster import ClusterConfig
from tedlab.cost import Placement, placement_of
from tedlab.degrees import ParallelDegrees


def kinds_of_ranks(degrees: ParallelDegrees, cluster: ClusterConfig) -> dict[int, list[int]]:
    """All ranks, by the first one of their kind.

    Ranks hold, compute and exchange alike; only where their groups lie on the cluster's nodes may differ, if nodes
    cannot be divided into tensor groups.
    """
    kinds: dict[tuple[Placement, ...], list[int]] = {}
    for rank in range(degrees.world_size):
        places = tuple(placement_of(group, cluster.gpus_per_node) for group in degrees.groups(rank).values())
        kinds.setdefault(places, []).append(rank)
    return {ranks[0]: ranks for ranks in kinds.values()}
