"""Routers that learn nothing, to compare others with. Legend as in ``router.py``.

Their choices have equal weights, which sum to one for each token, and their losses have no gradient.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from tedlab.moe.router import CHOICE_STREAM, Router, RouterSpec, routers
from tedlab.spec import MicroBatch, ParameterSpec, Work


@dataclass(frozen=True)
class FixedRouterSpec(RouterSpec):
    """Describes a :class:`FixedRouter`, which has no weights."""

    def own(self) -> Iterator[ParameterSpec]:
        return iter(())

    def flops(self, length: int) -> Counter[str]:
        return Counter()

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        return (work for work in super().forward(b) if work.kind != "gemm")

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        return iter(())

    def saved(self, b: MicroBatch) -> int:
        return 0


class FixedRouter(Router):
    """Base of the baselines."""

    spec: ClassVar[type[RouterSpec]] = FixedRouterSpec
    options = ()
    router_options = ()
    weights_learn = False
    supports: ClassVar[tuple[str, ...]] = ("dropless", "groups", "replay", "generate")

    @override
    def logits(self, x_TH: Tensor, sequence: int) -> Tensor:
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        return torch.zeros(len(x_TH), self.num_experts, dtype=dtype, device=x_TH.device)

    @override
    def gates(self, logits_TE: Tensor, scores_TE: Tensor, expert_TK: Tensor) -> Tensor:
        return torch.full_like(scores_TE[:, :1], 1 / self.top_k).expand(expert_TK.shape)


@routers.register("random")
class RandomRouter(FixedRouter):
    """Draws K experts for each token, others in each step (THOR, Zuo et al. 2022, without its pairs)."""

    supports: ClassVar[tuple[str, ...]] = (
        "dropless",
        "groups",
        "replay",
    )  # a text's tokens have no place in a batch that could be drawn for

    @override
    def choose(self, logits_TE: Tensor, scores_TE: Tensor, sequence: int) -> Tensor:
        return self.uniform(logits_TE, sequence, self.num_experts, CHOICE_STREAM).topk(self.top_k, dim=-1).indices


@routers.register("hash")
class HashRouter(FixedRouter):
    """Draws K experts for each token of the vocabulary, once for the run (Hash Layers, Roller et al. 2021)."""

    @override
    def choose(self, logits_TE: Tensor, scores_TE: Tensor, sequence: int) -> Tensor:
        """Chooses by the token ids of the micro-batch.

        Raises:
            RuntimeError: If the model does not say which tokens it has been given.
        """
        ids = self.context.ids
        if ids is None:
            raise RuntimeError(
                "moe.gating=hash chooses experts by token id: set `topology.context.ids` to the ids (B, S) of each "
                "micro-batch before the first router runs, as tedlab.models.GPT does"
            )
        if self.sharded:
            ids = ids.chunk(self.shards, 1)[self.comm.rank("tensor")]
        stream = self.stream(CHOICE_STREAM)
        drawn_TE = self.context.uniform(stream, ids.flatten(), self.num_experts, stepwise=False)
        return drawn_TE.topk(self.top_k, dim=-1).indices


@routers.register("round_robin")
class RoundRobinRouter(FixedRouter):
    """Deals tokens to experts in turn: token n of the global batch gets n·K, n·K + 1, … modulo E. Always balanced."""

    supports: ClassVar[tuple[str, ...]] = ("dropless", "groups", "replay")  # a text's tokens have no place in a batch

    @override
    def choose(self, logits_TE: Tensor, scores_TE: Tensor, sequence: int) -> Tensor:
        token_T1 = self.tokens(len(logits_TE), sequence).unsqueeze(1)
        return (token_T1 * self.top_k + torch.arange(self.top_k, device=token_T1.device)) % self.num_experts
