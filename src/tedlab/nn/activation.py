"""The activation between the two projections of a feed-forward layer or an expert."""

import torch.nn.functional as F
from torch import Tensor


def activate(z: Tensor, gated: bool) -> Tensor:
    """Applies GELU to (…, F), or SwiGLU to (…, 2·F), whose features alternate between gate and linear part.

    SwiGLU returns silu(gate) · linear part (Shazeer 2020, eq. 6). The result is (…, F) either way.
    """
    if not gated:
        return F.gelu(z)
    gate, linear = z.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gate) * linear
