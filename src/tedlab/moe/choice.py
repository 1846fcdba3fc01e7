"""The choice itself: each token's best experts, by scores, biases and groups. Legend as in ``router.py``."""

import torch
from torch import Tensor

from tedlab.config import GroupScore
from tedlab.moe.products import unfit


def best_experts(
    preferred_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    groups: int = 1,
    chosen_groups: int = 1,
    group_score: str = GroupScore.MAX,
) -> Tensor:
    """Returns each token's K best experts (T, K) int64, best first.

    Args:
        preferred_TE: What is preferred, without a gradient.
        bias_E: Added to every token's; None: nothing.
        top_k: Choices per token, K.
        groups: Number of groups that the experts form, each of neighbours.
        chosen_groups: Number of groups, the best ones, that a token chooses from.
        group_score: A group's score is its best expert's (``max``) or the sum of its best two (``top2``).
    """
    several = bias_E is not None or groups > 1
    if several and not torch.compiler.is_compiling() and unfit(preferred_TE.dtype, preferred_TE.device) is None:
        from tedlab.moe import choice_kernels

        return choice_kernels.best_experts(preferred_TE, bias_E, top_k, groups, chosen_groups, group_score)
    if bias_E is not None:
        preferred_TE = preferred_TE + bias_E
    if groups > 1:
        members_TGM = preferred_TE.unflatten(-1, (groups, -1))
        best = min(2 if group_score == GroupScore.TOP2 else 1, members_TGM.shape[-1])
        group_TG = members_TGM.topk(best, dim=-1).values.sum(-1)
        outside_TG = torch.ones_like(group_TG, dtype=torch.bool)
        outside_TG.scatter_(1, group_TG.topk(chosen_groups, dim=-1).indices, False)
        preferred_TE = members_TGM.masked_fill(outside_TG.unsqueeze(-1), -torch.inf).flatten(1)
    return preferred_TE.topk(top_k, dim=-1).indices
