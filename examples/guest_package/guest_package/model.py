"""A model: attention and feed-forward layer of a block side by side (GPT-J, PaLM) instead of one after the other."""

from torch import Tensor

from tedlab.models import GPT, Block, models
from tedlab.moe import RouterReport


class ParallelBlock(Block):
    """Has the layers of a block, and hence its specification; both see the same input."""

    def forward(
        self, x: Tensor, rotation: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, RouterReport | None]:
        """(B, S, H) → (B, S, H)."""
        attended = x + self.attention(self.norm1(x), rotation)
        if not self.routed:
            return attended + self.feed_forward(self.norm2(x)), None
        y, report = self.feed_forward(self.norm2(x), padding_mask)
        return attended + y, report


@models.register("guest_parallel")
class ParallelGPT(GPT):
    """``model.architecture=guest_parallel``."""

    block = ParallelBlock
