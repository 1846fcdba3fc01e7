"""Experts with a capacity to which only the choices travel that they take: nothing is padded (X-MoE, arXiv 2508.13337).

Which choices these are the router decides as for slots (``moe.dispatch=capacity``), by position or by score, so that
both compute the same; but experts get as many rows as they have slots that are full. The host must read their number.
"""

import torch
from torch import Tensor
from typing_extensions import override

from tedlab.comm import Issued
from tedlab.moe.experts import RowExperts, mixtures
from tedlab.moe.ragged import RaggedRows
from tedlab.moe.router import Routing


@mixtures.register("packed")
class PackedExperts(RowExperts):
    """Experts that take the rows of the choices for which they have a slot."""

    unlimited = False
    packed = True

    @override
    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        return super().forward(x_TH, without_gaps(routing, self.num_experts))

    @override
    def send(self, x_TH: Tensor, routing: Routing) -> list[Issued[RaggedRows]] | None:
        return super().send(x_TH, without_gaps(routing, self.num_experts))


def without_gaps(routing: Routing, num_experts: int) -> Routing:
    """Moves full slots to the front, in their order; empty ones are the end of ``choice_EC``. Nothing is waited for."""
    choice_EC = routing.choice_EC
    slots = len(choice_EC)
    full_EC = choice_EC >= 0
    place_EC = full_EC.cumsum(0) - 1
    to_EC = torch.where(full_EC, place_EC, slots)  # empty ones are written past the end, which is cut off
    packed_EC = torch.full((slots + 1,), -1, dtype=choice_EC.dtype, device=choice_EC.device)
    slot_TK = routing.slot_TK
    place_TK = place_EC[slot_TK.clamp(min=0)] if slots else slot_TK
    return routing._replace(
        slot_TK=torch.where(slot_TK < 0, -1, place_TK),
        choice_EC=packed_EC.scatter_(0, to_EC, choice_EC)[:slots],
        rows_E=full_EC.view(num_experts, -1).sum(1),
    )
