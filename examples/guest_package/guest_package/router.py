"""A router: an expert's share is its sigmoid among those of all (as in DeepSeek-V3), not a softmax."""

from torch import Tensor

from tedlab.moe import Router, routers


@routers.register("guest_sigmoid")
class SigmoidRouter(Router):
    """``moe.gating=guest_sigmoid``. Has the weights of a router, and hence its specification."""

    def scores(self, logits_TE: Tensor) -> Tensor:
        score_TE = logits_TE.sigmoid()
        return score_TE / score_TE.sum(-1, keepdim=True)
