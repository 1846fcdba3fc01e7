"""MoE layers of other frameworks between the same attention, norms and loss: peers of ``expert_parallel``.

Each constructor imports its framework, so only those that are measured need to be installed. All of them choose by
softmax and top-k without renormalising. All but DeepSpeed's drop nothing, and multiply SwiGLU experts in groups.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_experts import Experts, feed_forward
from tedlab.config import MoEConfig

MakeExperts = Callable[[int, int, MoEConfig, int], nn.Module]  # hidden and inner width, experts, processes


def torchtitan(hidden: int, inner: int, moe: MoEConfig, processes: int) -> nn.Module:
    """Returns torchtitan's MoE layer, with its ``ExpertParallel`` if there are several processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torchtitan.distributed.expert_parallel import ExpertParallel  # type: ignore[import-not-found]
    from torchtitan.models.moe.moe import MoE, MoEArgs  # type: ignore[import-not-found]

    choices = {"score_func": "softmax", "score_before_experts": False, "load_balance_coeff": None}
    layer = MoE(MoEArgs(num_experts=moe.num_experts, num_shared_experts=0, top_k=moe.top_k, **choices), hidden, inner)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    if processes > 1:
        mesh = init_device_mesh(torch.get_default_device().type, (processes,), mesh_dim_names=("ep",))
        ExpertParallel()._apply(layer.experts, mesh)
    return _Batched(layer)


class _Batched(nn.Module):
    """Gives tokens (T, H) a batch dimension."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.unsqueeze(0)).squeeze(0)
        return y


class MegatronExperts(nn.Module):
    """Megatron-Core's all-to-all dispatcher around two grouped products of torch.

    Its own grouped products need Transformer Engine. Gates multiply the activations, as there.
    """

    def __init__(self, hidden: int, inner: int, moe: MoEConfig, processes: int) -> None:
        super().__init__()
        from megatron.core.process_groups_config import ProcessGroupCollection  # type: ignore[import-not-found]
        from megatron.core.transformer.moe.token_dispatcher import (  # type: ignore[import-not-found]
            MoEAlltoAllTokenDispatcher,
        )
        from megatron.core.transformer.transformer_config import TransformerConfig  # type: ignore[import-not-found]

        self.top_k, self.num_experts, here = moe.top_k, moe.num_experts, moe.num_experts // processes
        self.router = nn.Linear(hidden, moe.num_experts, bias=False)
        self.up = nn.Parameter(torch.randn(here, hidden, 2 * inner) * 0.02)
        self.down = nn.Parameter(torch.randn(here, inner, hidden) * 0.02)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=hidden,
            num_attention_heads=1,
            num_moe_experts=moe.num_experts,
            moe_router_topk=moe.top_k,
            moe_ffn_hidden_size=inner,
            moe_token_dispatcher_type="alltoall",
            expert_model_parallel_size=processes,
        )
        groups: Any = ProcessGroupCollection()
        groups.ep = groups.tp_ep = dist.group.WORLD
        groups.expt_tp = dist.new_subgroups(1)[0]
        first = dist.get_rank() * here if processes > 1 else 0
        self.dispatcher = MoEAlltoAllTokenDispatcher(here, list(range(first, first + here)), config, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens (T, H) to (T, H)."""
        gates, experts = self.router(x).float().softmax(-1).topk(self.top_k, -1)
        probs = torch.zeros(len(x), self.num_experts, device=x.device).scatter(1, experts, gates)
        chosen = torch.zeros(probs.shape, dtype=torch.bool, device=x.device).scatter(1, experts, True)
        rows, probs = self.dispatcher.dispatch_preprocess(x, chosen, probs)
        rows, probs = self.dispatcher.token_dispatch(rows, probs)
        rows, counts, probs = self.dispatcher.dispatch_postprocess(rows, probs)
        ends = counts.to(x.device, non_blocking=True).cumsum(0).int()
        gate, linear = F.grouped_mm(rows, self.up, offs=ends).chunk(2, -1)
        weighted = (F.silu(gate) * linear * probs.unsqueeze(-1)).to(x.dtype)
        y = self.dispatcher.combine_preprocess(F.grouped_mm(weighted, self.down, offs=ends))
        y = self.dispatcher.combine_postprocess(self.dispatcher.token_combine(y))
        return y.view_as(x)


class DeepSpeedExperts(nn.Module):
    """DeepSpeed's MoE layer: GELU experts with biases, one product after the other, that drop tokens by capacity."""

    def __init__(self, hidden: int, inner: int, moe: MoEConfig, processes: int) -> None:
        super().__init__()
        import deepspeed
        from deepspeed.moe.layer import MoE

        deepspeed.init_distributed(dist.get_backend(), verbose=False)
        self.layer = MoE(
            hidden,
            feed_forward(hidden, inner),
            moe.num_experts,
            ep_size=processes,
            k=moe.top_k,
            capacity_factor=moe.capacity_factor,
            use_rts=False,
        )
        self.layer.set_deepspeed_parallelism()

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens (T, H) to (T, H)."""
        y: Tensor = self.layer(x)[0]
        return y


PEERS: dict[str, MakeExperts] = {
    "plain loop": Experts,
    "torchtitan": torchtitan,
    "Megatron-Core": MegatronExperts,
    "DeepSpeed": DeepSpeedExperts,
}
PACKAGES = {"torchtitan": "torchtitan", "Megatron-Core": "megatron-core", "DeepSpeed": "deepspeed"}


def missing(peer: str) -> str | None:
    """Returns the package that a peer needs and that is not installed, if any."""
    package = PACKAGES.get(peer)
    return package if package is not None and not _version(package) else None


def versions() -> dict[str, str]:
    """Returns the versions of peers' packages that are installed."""
    found = {package: _version(package) for package in PACKAGES.values()}
    return {package: version for package, version in found.items() if version}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
