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

        Raises:
            ValueError: If the largest logit of a sample is not finite.
        """
        if not logits_BV.amax(-1).isfinite().all():
            raise ValueError("the model's logits are not finite: it has diverged, so that no token is the next")
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        probability_BV = (logits_BV.double() / self.temperature).softmax(-1)
        token_BV = None  # in the order of the vocabulary
        if self.top_k is not None and self.top_k < probability_BV.shape[1]:
            probability_BV, token_BV = probability_BV.topk(self.top_k, dim=-1)
        elif self.top_p < 1:
            probability_BV, token_BV = probability_BV.sort(-1, descending=True)
        upto_BV = probability_BV.cumsum(-1)
        last_B1 = upto_BV[:, -1:]
        if self.top_p < 1:
            # A token is in the nucleus if those before it have less than its share; the first always is.
            inside_BV = upto_BV - probability_BV < self.top_p * last_B1
            last_B1 = upto_BV.masked_fill(~inside_BV, 0.0).amax(-1, keepdim=True)
        drawn = [torch.rand((), generator=stream, dtype=torch.float64) for stream in streams]
        place_B1 = torch.searchsorted(upto_BV, torch.stack(drawn).to(upto_BV.device).unsqueeze(1) * last_B1, right=True)
        place_B1 = place_B1.clamp(max=upto_BV.shape[1] - 1)
        return (place_B1 if token_BV is None else token_BV.gather(1, place_B1)).squeeze(1)
