"""The peer of ``vs_deepspeed.py``: tedlab's GPT as users of DeepSpeed write it, and DeepSpeed's engine around it.

Megatron-style tensor parallelism comes from the user, who tells DeepSpeed about it by an ``mpu``; the MoE layer, ZeRO
and everything that follows from them are DeepSpeed's own.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import logger
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from tedlab import Topology
from tedlab.config import ModelConfig, MoEConfig
from tedlab.models import GPT
from tedlab.nn import vocab_parallel_cross_entropy
from tedlab.optim.bucket import local

logger.setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*all_gather_into_tensor. is deprecated.*", FutureWarning)

_gather = deepspeed.comm.all_gather_into_tensor


def _gather_flat(output: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """DeepSpeed's MoE gathers (E, C, H) into a flat buffer, which NCCL tolerates and gloo does not."""
    return _gather(output, tensor.view(-1), *args, **kwargs)


deepspeed.comm.all_gather_into_tensor = _gather_flat


class ModelParallelUnit:
    """What DeepSpeed asks about the layout."""

    def __init__(self, topology: Topology) -> None:
        self._tensor, self._data = topology.dense.get_group("tensor"), topology.dense.get_group("data")

    def get_model_parallel_group(self) -> ProcessGroup:
        return self._tensor

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size()

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return self._data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelParallelUnit":
        return self  # DeepSpeed copies experts, and process groups cannot be copied


class _CopyTo(Function):
    """Megatron's f."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _ReduceFrom(Function):
    """Megatron's g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        dist.all_reduce(x, group=group)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Linear(nn.Module):
    """A linear layer divided by output features (``column``), or by input features (``row``).

    Its parameters are named as in tedlab's, and have the same shapes.
    """

    def __init__(self, inputs: int, outputs: int, division: str, mpu: ModelParallelUnit) -> None:
        super().__init__()
        self.column, self.mpu = division == "column", mpu
        size = mpu.get_model_parallel_world_size()
        rows, columns = (outputs // size, inputs) if self.column else (outputs, inputs // size)
        self.weight, self.bias = nn.Parameter(torch.empty(rows, columns)), nn.Parameter(torch.empty(rows))

    def forward(self, x: Tensor) -> Tensor:
        group = self.mpu.get_model_parallel_group()
        if self.column:
            return F.linear(_CopyTo.apply(x, group), self.weight, self.bias)
        return _ReduceFrom.apply(F.linear(x, self.weight), group) + self.bias


class FeedForward(nn.Module):
    """Also an expert, which DeepSpeed copies."""

    def __init__(self, model: ModelConfig, mpu: ModelParallelUnit) -> None:
        super().__init__()
        self.up = Linear(model.hidden, model.ffn, "column", mpu)
        self.down = Linear(model.ffn, model.hidden, "row", mpu)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Attention(nn.Module):
    """Causal self-attention, its heads divided over the group."""

    def __init__(self, model: ModelConfig, mpu: ModelParallelUnit) -> None:
        super().__init__()
        self.head_dim = model.hidden // model.heads
        self.qkv = Linear(model.hidden, 3 * model.hidden, "column", mpu)
        self.out = Linear(model.hidden, model.hidden, "row", mpu)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, 3, self.head_dim))
        q, k, v = qkv.transpose(1, 2).unbind(-2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Pre-norm transformer block; ``feed_forward`` is dense or DeepSpeed's MoE layer."""

    def __init__(
        self, index: int, model: ModelConfig, moe: MoEConfig, expert_degree: int, mpu: ModelParallelUnit
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(model.hidden), nn.LayerNorm(model.hidden)
        self.attention = Attention(model, mpu)
        self.feed_forward: nn.Module = FeedForward(model, mpu)
        if index % moe.every == moe.every - 1:
            self.feed_forward = MoE(
                model.hidden,
                self.feed_forward,
                moe.num_experts,
                ep_size=expert_degree,
                k=moe.top_k,
                capacity_factor=moe.capacity_factor,
                use_rts=bool(moe.random_token_selection),
                enable_expert_tensor_parallelism=True,
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, H) → (B, S, H), and the balancing loss."""
        x = x + self.attention(self.norm1(x))
        if isinstance(self.feed_forward, MoE):
            y, balance_loss, _ = self.feed_forward(self.norm2(x))
            return x + y, balance_loss
        return x + self.feed_forward(self.norm2(x)), x.new_zeros(())


class PeerGPT(nn.Module):
    """tedlab's GPT with tied embeddings, its weights taken from one.

    Args:
        ours: the same shard of the same model, in tedlab.
        model, moe: its configuration.
        topology: where this process stands.
        mpu: the same, as DeepSpeed wants it.
    """

    def __init__(
        self, ours: GPT, model: ModelConfig, moe: MoEConfig, topology: Topology, mpu: ModelParallelUnit
    ) -> None:
        super().__init__()
        assert model.vocab_size is not None
        self.comm, self.group = topology.comm, mpu.get_model_parallel_group()
        self.recompute = model.recompute.granularity == "block"
        rows = model.vocab_size // self.group.size()
        self.start = self.group.rank() * rows
        self.embedding = nn.Embedding(rows, model.hidden)
        self.positions = nn.Embedding(model.sequence_length, model.hidden)
        self.blocks = nn.ModuleList(Block(i, model, moe, topology.degrees.expert, mpu) for i in range(model.layers))
        self.norm = nn.LayerNorm(model.hidden)
        self._take_weights(ours)
        self._mark_model_parallel()

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) and (B, S) int64 → mean cross-entropy, and the sum of the balancing losses."""
        row = ids - self.start
        elsewhere = (row < 0) | (row >= self.embedding.num_embeddings)
        found = self.embedding(row.masked_fill(elsewhere, 0)).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        x = _ReduceFrom.apply(found, self.group) + self.positions.weight[: ids.shape[1]]
        balance = x.new_zeros(())
        for block in self.blocks:
            x, balance_loss = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
            balance = balance + balance_loss
        logits = F.linear(_CopyTo.apply(self.norm(x), self.group), self.embedding.weight)
        # The user's part, and no difference between the two: tedlab's own function.
        return vocab_parallel_cross_entropy(logits.flatten(0, 1), targets.flatten(), self.comm).mean(), balance

    @torch.no_grad()
    def _take_weights(self, ours: GPT) -> None:
        expert = re.compile(r"(.*)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(up|down)\.(weight|bias)")
        source = {name: local(p) for name, p in ours.named_parameters()}
        for name, p in self.named_parameters():
            if match := expert.fullmatch(name):
                layer, index, projection, kind = match.groups()
                stacked = source[f"{layer}.experts.{projection}{'_bias' if kind == 'bias' else ''}"]
                p.copy_(stacked[int(index)].t() if kind == "weight" else stacked[int(index), 0])
            else:
                p.copy_(source[name.replace(".deepspeed_moe.gate.wg.", ".router.")])

    def _mark_model_parallel(self) -> None:
        """Without these marks DeepSpeed's gradient norm leaves out every tensor rank but the first."""
        divided = [self.embedding.weight]
        for module in self.modules():
            if isinstance(module, Linear):
                divided += [module.weight, module.bias] if module.column else [module.weight]
        for p in divided:
            p.model_parallel = True  # type: ignore[attr-defined]


def engine(
    ours: GPT,
    model: ModelConfig,
    moe: MoEConfig,
    topology: Topology,
    *,
    lr: float,
    weight_decay: float,
    clip: float,
    zero: Mapping[str, Any],
) -> deepspeed.DeepSpeedEngine:
    """The peer under DeepSpeed: ZeRO-1, AdamW, clipping; whatever else there is to set is left at its default.

    Args:
        ours, model, moe, topology: see :class:`PeerGPT`.
        lr, weight_decay: of AdamW.
        clip: largest gradient norm.
        zero: further settings of ``zero_optimization``.
    """
    mpu = ModelParallelUnit(topology)
    peer = PeerGPT(ours, model, moe, topology, mpu)
    groups = split_params_into_different_moe_groups_for_optimizer({"name": "all", "params": list(peer.parameters())})
    optimizer = {"lr": lr, "weight_decay": weight_decay, "torch_adam": True}  # its own Adam would be compiled first
    config = {
        "train_micro_batch_size_per_gpu": 1,  # which it only reports
        "zero_optimization": {"stage": 1, **zero},
        "optimizer": {"type": "AdamW", "params": optimizer},
        "gradient_clipping": clip,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the groups that it makes
        return deepspeed.initialize(model=peer, model_parameters=groups, mpu=mpu, config=config)[0]
