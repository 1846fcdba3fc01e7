"""Expert choice (Zhou et al. 2022): experts choose tokens, instead of tokens experts. Legend as in ``router.py``."""

import torch
from torch import Tensor
from typing_extensions import override

from tedlab.capacity import group_capacity
from tedlab.comm import pin
from tedlab.config import MoEConfig
from tedlab.moe.router import Decision, Router, routers
from tedlab.moe.slots import choices_of_slots


@routers.register("expert_choice")
class ExpertChoiceRouter(Router):
    """Every expert takes the C tokens of the micro-batch that score highest for it, so that none is ever idle.

    C is the capacity for K choices per token. A token may be taken by any number of experts, from none to all, and the
    weight of each is its score. What a token gets depends on later tokens of its sample and on other samples: as a
    language model, it is trained with knowledge of the future that it will not have when it writes a text.

    A token has room for E choices, and so the results that it combines take E/K times the memory of other routers'.

    The report counts as dropped K choices of each token that no expert took.
    """

    options = ()
    router_options = ("scoring", "gate_scale", "noise", "noise_std", "jitter", "bias")
    supports = ("groups",)

    @classmethod
    @override
    def choices(cls, config: MoEConfig) -> int:
        return config.num_experts

    @override
    def decide(self, logits_TE: Tensor, sequence: int, padding_T: Tensor | None = None) -> Decision:
        tokens, groups, experts = len(logits_TE), self.groups, self.num_experts
        scores_TE = self.scores(logits_TE)
        preferred_TE = self.preferences(logits_TE, scores_TE, sequence)
        if padding_T is not None:
            preferred_TE = preferred_TE.masked_fill(padding_T.unsqueeze(1), -torch.inf)
        capacity = group_capacity(self.config, tokens // groups, self.all_groups)
        # Tokens by group, each a part of the positions of every sample.
        token_BS = torch.arange(tokens, device=logits_TE.device).view(-1, sequence)
        token_GN = token_BS.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1)
        taken = min(capacity, token_GN.shape[1])
        place_GCE = pin(preferred_TE[token_GN].topk(taken, dim=1).indices)
        token_EGC = token_GN.unsqueeze(2).expand(-1, -1, experts).gather(1, place_GCE).permute(2, 0, 1)
        slot_EGC = torch.arange(experts * groups * capacity, device=token_EGC.device).view(experts, groups, -1)
        expert_EGC = torch.arange(experts, device=token_EGC.device).view(-1, 1, 1).expand_as(token_EGC)
        slot_TE = torch.full((tokens, experts), -1, dtype=torch.int64, device=token_EGC.device)
        slot_TE = slot_TE.index_put((token_EGC, expert_EGC), slot_EGC[:, :, :taken])
        if padding_T is not None:  # fewer tokens than slots
            slot_TE = slot_TE.masked_fill(padding_T.unsqueeze(1), -1)
        taken_TE = slot_TE >= 0
        idle_T = ~taken_TE.any(1) if padding_T is None else ~taken_TE.any(1) & ~padding_T
        return Decision(
            scores_TE.masked_fill(~taken_TE, 0.0) * self.config.router.gate_scale,
            slot_TE,
            choices_of_slots(slot_TE, experts * groups * capacity),
            probs_TE=self.probabilities(scores_TE),
            counted_TE=taken_TE.to(scores_TE.dtype) / self.top_k,
            load=taken_TE.sum(0),
            dropped=self.top_k * idle_T.sum(),
        )
