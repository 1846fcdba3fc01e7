"""Makes the policy that a configuration names, for the processes of one expert group."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from tedlab.config import LendConfig, LendPolicy
from tedlab.moe.lending.plan import Plan, even, least_loaded

Policy = Callable[[np.ndarray], Plan]  # from the number of rows of each expert, (E,)


def policy_of(config: LendConfig, ranks: Sequence[int], tensor: int = 1) -> Policy | None:
    """Returns the policy of an expert group, or None if it never lends.

    Args:
        config: Numbers in place of ``minimum=auto``, as :func:`tedlab.validate.complete` fills them in.
        ranks: The global ranks of the group's processes; with tensor parallelism, of their first tensor ranks, so that
            all tensor ranks plan alike.
        tensor: The tensor degree.
    """
    if config.policy == LendPolicy.NONE or len(ranks) == 1:
        return None
    if config.policy == LendPolicy.EVEN:
        return partial(even, processes=len(ranks))
    return partial(
        least_loaded,
        processes=len(ranks),
        threshold=config.threshold,
        alpha=config.alpha,
        minimum=_minimum(config, ranks, tensor),
        keep_small=config.keep_small,
    )


def _minimum(config: LendConfig, ranks: Sequence[int], tensor: int) -> np.ndarray:
    """Returns the fewest rows that are worth a loan, by home and borrower (P, P).

    A loan is inside a node if it is for every tensor rank.
    """
    given = config.minimum
    if given == "auto":
        raise ValueError("moe.lend.minimum=auto has no numbers yet: complete the configuration, or give them")
    inside, between = (given, given) if isinstance(given, int) else given
    node_PT = (np.array(ranks)[:, None] + np.arange(tensor)) // (config.ranks_per_node or max(ranks) + tensor)
    return np.where((node_PT[:, None] == node_PT).all(-1), inside, between)
