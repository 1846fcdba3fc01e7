"""Checks how experts are lent, and fills in how many rows are worth a loan."""

from dataclasses import replace

from tedlab.config import Dedup, LendConfig, LendPolicy, TrainConfig
from tedlab.predict.cluster import ClusterConfig, load_cluster
from tedlab.predict.lending import break_even_on
from tedlab.predict.volumes import ClosedForm


def check_lending(config: TrainConfig) -> None:
    """Checks ``moe.lend``, if there are experts.

    Raises:
        ValueError: If it is invalid; the message says what would do.
    """
    lend, moe = config.moe.lend, config.moe
    if lend.minimum != "auto":
        _numbers(lend)
    if lend.policy == LendPolicy.NONE:
        return
    if not moe.unlimited:
        raise ValueError(
            f"moe.lend.policy={lend.policy} moves rows to processes that have fewer, but with moe.dispatch="
            f"{moe.dispatch} all have as many slots; use moe.dispatch=dropless, or moe.lend.policy=none"
        )
    if config.comm.dedup != Dedup.NONE:
        raise ValueError(
            f"moe.lend.policy={lend.policy} moves rows of experts to other processes, but with comm.dedup="
            f"{config.comm.dedup} a token travels once for all of its experts in a process; use one of the two"
        )
    if lend.minimum == "auto" and lend.policy == LendPolicy.LLEP and config.parallel.expert > 1:
        break_even_on(load_cluster(config.comm.emulate or lend.cluster), config.trainer["precision"], itemsize=2)


def minimum_filled_in(config: TrainConfig, cluster: ClusterConfig | None = None) -> LendConfig:
    """Returns ``moe.lend`` with numbers in place of ``minimum=auto``, and the number of ranks of a node.

    Args:
        config: The job's configuration, complete otherwise.
        cluster: The cluster whose links ``auto`` assumes; None: ``moe.lend.cluster``. An emulated one overrides both.
    """
    lend, comm = config.moe.lend, config.comm
    if lend.policy != LendPolicy.LLEP:
        return lend
    if comm.emulate is not None or cluster is None:
        cluster = load_cluster(comm.emulate or lend.cluster)
    per_node = lend.ranks_per_node or comm.emulate_ranks_per_node or cluster.gpus_per_node
    precision = config.trainer["precision"]
    if config.parallel.expert == 1:  # nobody to lend to
        minimum = 1, 1
    elif lend.minimum == "auto":
        minimum = break_even_on(cluster, precision, ClosedForm(config).compute.itemsize)
    else:
        minimum = _numbers(lend)
    return replace(lend, minimum=list(minimum), ranks_per_node=per_node)


def _numbers(lend: LendConfig) -> tuple[int, int]:
    """Returns the numbers that ``minimum`` gives for loans inside a node and between nodes."""
    given = lend.minimum if isinstance(lend.minimum, list) else [lend.minimum] * 2
    if len(given) != 2 or not all(type(number) is int and number >= 1 for number in given):
        raise ValueError(
            f"moe.lend.minimum={lend.minimum} must be the fewest rows that are worth a loan: a whole number of at "
            "least 1, two of them (inside a node, between nodes) as [INSIDE,BETWEEN], or auto"
        )
    return given[0], given[1]
