"""Each layer does the work and keeps the bytes that its specification states, as plain torch counts them.

FLOPs are those of torch's ``FlopCounterMode``; kept are the storages, other than parameters', that autograd saves.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tedlab import ParallelDegrees, Topology
from tedlab.comm.rows import Rows
from tedlab.config import MoEConfig, SharedConfig
from tedlab.moe import MoELayer, MoESpec, SharedExperts, SharedSpec
from tedlab.nn import (
    ColumnParallelLinear,
    ColumnParallelSpec,
    FeedForward,
    FeedForwardSpec,
    Init,
    LatentAttention,
    LatentAttentionSpec,
    LayerNorm,
    NormSpec,
    RMSNorm,
    RowParallelLinear,
    RowParallelSpec,
    SelfAttention,
    SelfAttentionSpec,
    initialize,
    rotation,
)
from tedlab.spec import Layout, MicroBatch, Spec
from tests.pool import WorkerPool

BATCH, LENGTH, HIDDEN, FFN = 2, 16, 32, 48
INIT = Init(std=0.1)
EXPERTS = MoEConfig(num_experts=4, top_k=2)
BESIDE = MoEConfig(num_experts=4, top_k=2, shared=SharedConfig(2, ffn=16))
ATTENTION: dict[str, dict[str, Any]] = {
    "attention": {},
    "rotary_attention": {"rotary": True, "bias": False},
    "shared_attention": {"rotary": True, "kv_heads": 2},
    "shared_attention_unturned": {"kv_heads": 2},
    "grouped_attention": {"rotary": True, "bias": False, "kv_heads": 2, "width": 16, "qk_norm": 1e-6},
    "attention_of_one_key": {"rotary": True, "kv_heads": 1, "qk_norm": 1e-6},  # which two tensor ranks share
    "attention_normed_together": {"rotary": True, "qk_norm": 1e-6, "together": True},
    "grouped_attention_normed_together": {"rotary": True, "kv_heads": 1, "qk_norm": 1e-6, "together": True},
    "window_attention": {"rotary": True, "kv_heads": 2, "window": 5},
    "sink_attention": {"kv_heads": 2, "sinks": True},
}
SPECS: dict[str, Spec] = {
    "column": ColumnParallelSpec(HIDDEN, FFN, "test", INIT),
    "row": RowParallelSpec(FFN, HIDDEN, "test", INIT),
    "gelu": FeedForwardSpec(HIDDEN, FFN, INIT, INIT),
    "swiglu": FeedForwardSpec(HIDDEN, FFN, INIT, INIT, "swiglu", bias=False),
    "layer_norm": NormSpec(HIDDEN),
    "rms_norm": NormSpec(HIDDEN, "rms"),
    "experts": MoESpec(FeedForwardSpec(HIDDEN, FFN, INIT, INIT), EXPERTS),
    "clamped": FeedForwardSpec(HIDDEN, FFN, INIT, INIT, "clamped_swiglu", limit=0.1),
    "shared": SharedSpec(HIDDEN, FFN, INIT, INIT, "swiglu", bias=False, tag="shared"),
    "weighted_shared": SharedSpec(HIDDEN, FFN, INIT, INIT, tag="shared", combine="cg1"),
    "beside_shared": MoESpec(FeedForwardSpec(HIDDEN, FFN, INIT, INIT), BESIDE),
    "weighted_beside_shared": MoESpec(
        FeedForwardSpec(HIDDEN, FFN, INIT, INIT), replace(BESIDE, shared=SharedConfig(2, 16, "cg2"))
    ),
    "clamped_experts": MoESpec(FeedForwardSpec(HIDDEN, FFN, INIT, INIT, "clamped_swiglu"), EXPERTS),
    "swiglu_experts": MoESpec(FeedForwardSpec(HIDDEN, FFN, INIT, INIT, "swiglu", bias=False), EXPERTS),
    "latent_attention": LatentAttentionSpec(HIDDEN, 4, 12, 10, 6, 4, 8, INIT, INIT, scale=1.5),
    "latent_attention_of_activations": LatentAttentionSpec(HIDDEN, 4, 12, None, 6, 4, 6, INIT, INIT, bias=True),
    **{name: SelfAttentionSpec(HIDDEN, 4, INIT, INIT, **options) for name, options in ATTENTION.items()},
}
LAYERS: dict[type[Spec], Callable[[Any, Topology], nn.Module]] = {
    ColumnParallelSpec: ColumnParallelLinear,
    RowParallelSpec: RowParallelLinear,
    FeedForwardSpec: FeedForward,
    SharedSpec: SharedExperts,
    NormSpec: lambda spec, topology: (RMSNorm if spec.kind == "rms" else LayerNorm)(spec, topology),
    MoESpec: MoELayer,
    SelfAttentionSpec: SelfAttention,
    LatentAttentionSpec: LatentAttention,
}
# What the specification leaves out: a number for each row of a norm, and of routers' small tensors all but a sum.
ROUGHLY = {
    **{"rms_norm": 0.05, "layer_norm": 0.07, "experts": 0.06, "swiglu_experts": 0.06},
    **{"clamped_experts": 0.06, "beside_shared": 0.06, "weighted_beside_shared": 0.06},
    **dict.fromkeys(("latent_attention", "latent_attention_of_activations"), 0.03),
    **{name: 0.04 for name, options in ATTENTION.items() if "qk_norm" in options},
}


def counted(name: str) -> tuple[float, float, int]:
    """FLOPs of the forward and of the backward pass, and bytes kept between them, of this process."""
    size = dist.get_world_size()
    spec, topology = SPECS[name], Topology(ParallelDegrees(size, tensor=size))
    layer = LAYERS[type(spec)](spec, topology)
    initialize(layer, 0)
    features = FFN // size if name == "row" else HIDDEN
    x = torch.randn(BATCH, LENGTH, features, generator=torch.Generator().manual_seed(0)).requires_grad_()
    turned = isinstance(spec, LatentAttentionSpec) or (isinstance(spec, SelfAttentionSpec) and spec.rotary)
    more = [rotation(LENGTH, spec.rotary_dim, 1e4, x.device, x.dtype)] if turned else []
    own = {p.detach().to_local().data_ptr() for p in layer.parameters()}  # type: ignore[attr-defined]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own and tensor.numel() * tensor.itemsize > 64:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def run() -> Tensor:
        y = layer(x, *more)
        return y[0] if isinstance(y, tuple) else y

    for part in more:
        own.update(half.data_ptr() for half in part)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):  # the only one that torch counts
        y = run()
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops(), sum(kept.values())


def all_counted() -> dict[str, tuple[float, float, int]]:
    return {name: counted(name) for name in SPECS}


@pytest.fixture(scope="module", params=[1, 2], ids="tensor {}".format)
def world(pool: WorkerPool, request: pytest.FixtureRequest) -> tuple[int, dict[str, tuple[float, float, int]]]:
    """The tensor degree, and what its first process counts."""
    return request.param, pool.run(request.param, all_counted)[0]


def micro_batch(spec: Spec, tensor: int) -> MicroBatch:
    layout, tokens, dtype = Layout(ParallelDegrees(tensor, tensor)), BATCH * LENGTH, torch.float32
    rows = spec.dispatch.rows(layout, tokens) if isinstance(spec, MoESpec) else Rows()
    return MicroBatch(layout, tokens, LENGTH, dtype, dtype, dtype, rows)


@pytest.mark.parametrize("name", SPECS)
def test_flops_are_those_that_torch_counts(world: tuple[int, dict[str, Any]], name: str) -> None:
    tensor, found = world
    spec, (forward, backward, _) = SPECS[name], found[name]
    b = micro_batch(spec, tensor)
    stated = [sum(work.flops for work in works) for works in (spec.forward(b), spec.backward(b))]
    if isinstance(spec, SelfAttentionSpec) and not (spec.window or spec.sinks):  # which count for themselves
        # Two products of all pairs forward and four backward, of which a causal kernel does half and one product again.
        product = 2 * BATCH * LENGTH**2 * spec.heads * spec.head_dim // tensor
        forward, backward = forward - 2 * product + product, backward - 4 * product + 2.5 * product
    assert stated == [forward, backward]


@pytest.mark.parametrize("name", SPECS)
def test_kept_are_the_bytes_that_autograd_saves(world: tuple[int, dict[str, Any]], name: str) -> None:
    tensor, found = world
    spec, kept = SPECS[name], found[name][2]
    assert spec.saved(micro_batch(spec, tensor)) == pytest.approx(kept, rel=ROUGHLY.get(name, 1e-9))
