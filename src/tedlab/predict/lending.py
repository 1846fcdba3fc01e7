"""How many rows make it worth lending an expert, on given links.

Each loan sends W bytes of weights and in backward as many of gradients; each row of it spares its home three products
(one forward, two backward) of 2·W/q FLOPs, for numbers of q bytes. At R FLOP/s and B bytes/s, n rows gain as much time
as the loan takes if n · 3 · 2 · W / (q · R) = 2 · W / B, so n = q · R / (3 · B): how large experts are does not matter.
This leaves out that the exchange may run beside something else, which would make fewer rows worth it, and its latency.
"""

import math

from tedlab.predict.cluster import ClusterConfig


def break_even_rows(flops: float, bandwidth: float, itemsize: int) -> int:
    """Returns the smallest number of rows for which a loan takes no more time than it saves.

    Args:
        flops: FLOP/s that products of rows reach.
        bandwidth: Bytes/s at which a process sends weights.
        itemsize: Bytes of a number.
    """
    return max(1, math.ceil(itemsize * flops / (3 * bandwidth)))


def break_even_on(cluster: ClusterConfig, precision: str, itemsize: int) -> tuple[int, int]:
    """Returns the break-even inside a node, and between nodes.

    Where there is no such link, the number of the other stands for it. Between nodes, a GPU has its share of what a
    node reaches in an all-to-all.

    Args:
        cluster: The cluster.
        precision: A value of Lightning's ``trainer.precision``.
        itemsize: Bytes of a number in matrix products.

    Raises:
        ValueError: If the cluster has no links.
    """
    efficiency = cluster.efficiency
    slower = cluster.slower
    flops = cluster.peak(precision) * efficiency.gemm / slower.kernels
    found = []
    if cluster.in_node is not None:
        rate = cluster.in_node.exchange_rate(efficiency.in_node)
        found.append(break_even_rows(flops, rate / slower.collectives, itemsize))
    if cluster.between_nodes is not None:
        share = cluster.between_nodes.exchange_rate(efficiency.all_to_all) / cluster.gpus_per_node
        found.append(break_even_rows(flops, share / slower.collectives, itemsize))
    if not found:
        raise ValueError(
            "moe.lend.minimum=auto asks how many rows are worth a loan over a cluster's links, and this cluster has "
            "none; name one with links in moe.lend.cluster, or give a number, such as moe.lend.minimum=1024"
        )
    return found[0], found[-1]
