"""What follows from other values: filled in, in a copy."""

from dataclasses import replace

from tedlab.config import TrainConfig
from tedlab.degrees import ParallelDegrees
from tedlab.predict.cluster import ClusterConfig
from tedlab.validate.batches import accumulation
from tedlab.validate.comm import what_to_keep
from tedlab.validate.experts import capacity_groups
from tedlab.validate.model import vocabulary


def filled_in(
    config: TrainConfig, degrees: ParallelDegrees, tokens: int, cluster: ClusterConfig | None = None
) -> TrainConfig:
    """A complete copy of a configuration that has been checked.

    Args:
        config: as composed.
        degrees: its parallel degrees.
        tokens: of the tokenizer.
        cluster: what ``comm.cac=auto`` reckons with; None: ``comm.cac_cluster``.
    """
    timed = config.comm.ledger.time or config.comm.emulate is not None  # without it nothing would show of the delays
    completed = replace(
        config,
        model=replace(config.model, vocab_size=vocabulary(config, tokens)),
        moe=replace(config.moe, capacity_groups=capacity_groups(config, degrees)),
        comm=replace(config.comm, ledger=replace(config.comm.ledger, time=timed)),
        trainer={**config.trainer, "accumulate_grad_batches": accumulation(config, degrees)},
    )
    return replace(completed, comm=replace(completed.comm, cac=what_to_keep(completed, degrees, cluster)))
