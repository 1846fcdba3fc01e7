"""Fills in, in a copy of a configuration, the values that follow from others."""

from dataclasses import replace

from tedlab.config import TrainConfig
from tedlab.degrees import ParallelDegrees
from tedlab.predict.cluster import ClusterConfig
from tedlab.validate.batches import accumulation
from tedlab.validate.comm import ranks_per_node, what_to_keep
from tedlab.validate.experts import capacity_groups
from tedlab.validate.lending import minimum_filled_in
from tedlab.validate.model import vocabulary


def filled_in(
    config: TrainConfig, degrees: ParallelDegrees, tokens: int, cluster: ClusterConfig | None = None
) -> TrainConfig:
    """Returns a complete copy of a configuration that has been checked.

    Args:
        config: The configuration as composed.
        degrees: Its parallel degrees.
        tokens: The vocabulary size of the tokenizer.
        cluster: The cluster whose links ``comm.cac=auto`` and ``moe.lend.minimum=auto`` assume, and whose nodes
            ``comm.ranks_per_node=null`` means; None: ``comm.cac_cluster``, ``moe.lend.cluster`` and this machine.

    Raises:
        ValueError: If expert groups do not lie evenly on the nodes of the cluster.
    """
    timed = config.comm.ledger.time or config.comm.emulate is not None  # otherwise the delays would not show
    completed = replace(
        config,
        model=replace(config.model, vocab_size=vocabulary(config, tokens)),
        moe=replace(config.moe, capacity_groups=capacity_groups(config, degrees)),
        comm=replace(
            config.comm,
            ledger=replace(config.comm.ledger, time=timed),
            ranks_per_node=ranks_per_node(config, cluster),
        ),
        trainer={**config.trainer, "accumulate_grad_batches": accumulation(config, degrees)},
    )
    completed = replace(completed, moe=replace(completed.moe, lend=minimum_filled_in(completed, cluster)))
    return replace(completed, comm=replace(completed.comm, cac=what_to_keep(completed, degrees, cluster)))
