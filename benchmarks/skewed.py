"""A router that chooses experts as unequally as real ones do, for ``expert_parallel``'s rows with skewed routing."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from tedlab.moe.router import CHOICE_STREAM, Router, routers

EXPONENT = 1.2


@routers.register("zipf")
class ZipfRouter(Router):
    """Draws K experts for each token, the r-th in proportion to r^-1.2; what was learned only weights them."""

    supports: ClassVar[tuple[str, ...]] = ("dropless",)

    @override
    def preferences(self, logits_TE: Tensor, scores_TE: Tensor, sequence: int) -> Tensor:
        uniform_TE = self.uniform(logits_TE, sequence, self.num_experts, CHOICE_STREAM)
        rank_E = torch.arange(1, self.num_experts + 1, device=logits_TE.device)
        return -EXPONENT * rank_E.log() - (-uniform_TE.log()).log()  # the K largest are a draw without replacement
