"""How evenly routers spread their tokens, in a number of values that does not grow with layers or experts."""

import torch
from torch import Tensor

from tedlab.moe.router import RouterReport

_GROUPS: dict[int, tuple[str, ...]] = {1: (), 2: ("early", "late")}  # number of layers, if small → groups


def router_health(routers: RouterReport) -> dict[str, float]:
    """Returns seven values averaged over all MoE layers, and over groups of layers.

    Values are computed per layer. Only the shares of the counts matter, not their scale.

    - ``load_cv``: standard deviation of the experts' loads, divided by their mean; 0 when balanced.
    - ``max_violation``: largest load / mean load - 1; 0 when balanced.
    - ``entropy``: exp(H) / E, where H is the entropy of the load in nats: the effective number of experts as a share of
      all; 1 when balanced, 1/E when one expert gets everything.
    - ``dead_experts``: share of experts that got no token.
    - ``dropped_fraction``: share of choices that found no slot.
    - ``balance_loss``, ``z_loss``: before their coefficients.

    Args:
        routers: Sums or means of reports, in fp64, with one row per MoE layer: load (L, E), all others (L,).

    Returns:
        ``<value>``, and ``<group>/<value>`` for the groups early, middle and late: the first, second and last third of
        the MoE layers. Two layers form two groups, early and late; a single layer forms none.
    """
    load_LE = routers.load
    mean_L = load_LE.mean(-1)
    share_LE = load_LE / load_LE.sum(-1, keepdim=True)
    by_layer = {
        "load_cv": load_LE.std(-1, correction=0) / mean_L,
        "max_violation": load_LE.amax(-1) / mean_L - 1,
        "entropy": torch.special.entr(share_LE).sum(-1).exp() / load_LE.shape[-1],
        "dead_experts": (load_LE == 0).to(load_LE.dtype).mean(-1),
        "dropped_fraction": routers.dropped / load_LE.sum(-1),
        "balance_loss": routers.balance_loss,
        "z_loss": routers.z_loss,
    }
    names = list(by_layer)
    values_NL = torch.stack(list(by_layer.values()))
    means = dict(zip(names, values_NL.mean(-1).tolist(), strict=True))
    groups = _GROUPS.get(len(mean_L), ("early", "middle", "late"))
    for number, group in enumerate(groups):
        part = values_NL.tensor_split(len(groups), dim=1)[number].mean(-1)
        means |= {f"{group}/{name}": value for name, value in zip(names, part.tolist(), strict=True)}
    return means


def relative_load(routers: RouterReport) -> Tensor:
    """Returns each expert's load divided by its layer's mean (L, E); 1 when balanced."""
    return routers.load / routers.load.mean(-1, keepdim=True)
