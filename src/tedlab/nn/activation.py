"""What stands between the two projections of a feed-forward layer or an expert."""

import torch.nn.functional as F
from torch import Tensor


def activate(z: Tensor, gated: bool) -> Tensor:
    """GELU of (…, F); or SwiGLU of (…, 2·F), gate and linear part in turn, silu(gate) · linear part: (…, F).

    Source: Shazeer 2020, eq. 6.
    """
    if not gated:
        return F.gelu(z)
    gate, linear = z.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gate) * linear
