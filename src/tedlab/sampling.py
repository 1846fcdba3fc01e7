"""Chooses the next token of a text from logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Samples draw from streams of their own, so that none depends on its batch.

    Attributes:
        temperature: Divides logits; 0: always the most probable token.
        top_k: Only so many of the most probable tokens can be chosen; None: all.
        top_p: Only the most probable tokens can be chosen that together have at least this probability.
        seed: Of the first sample's stream; the next ones have the following seeds.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def streams(self, samples: int) -> list[torch.Generator]:
        """Returns the streams of random numbers of the first samples."""
        return [torch.Generator().manual_seed((self.seed + number) % 2**63) for number in range(samples)]

    def choose(self, logits_BV: Tensor, streams: Sequence[torch.Generator]) -> Tensor:
        """Returns a token for each sample (B,) int64.

        Args:
            logits_BV: (B, V).
            streams: One for each sample, from which it takes a number unless the temperature is 0.
        """
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        probability_BV, token_BV = (logits_BV.double() / self.temperature).softmax(-1).sort(-1, descending=True)
        if self.top_k is not None:
            probability_BV = probability_BV[:, : self.top_k]
        upto_BV = probability_BV.cumsum(-1)
        whole_B1 = upto_BV[:, -1:]
        # A token is in the nucleus if those before it have less than its share; the first always is.
        inside_BV = upto_BV - probability_BV < self.top_p * whole_B1
        last_B1 = upto_BV.masked_fill(~inside_BV, 0.0).amax(-1, keepdim=True)
        drawn = [torch.rand((), generator=stream, dtype=torch.float64) for stream in streams]
        place_B1 = torch.searchsorted(upto_BV, torch.stack(drawn).to(upto_BV.device).unsqueeze(1) * last_B1, right=True)
        return token_BV.gather(1, place_B1.clamp(max=upto_BV.shape[1] - 1)).squeeze(1)
