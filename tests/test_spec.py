"""What layers state about themselves is what they are: their parameters, and how these are divided and reduced."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tedlab import ParallelDegrees, Topology
from tedlab.config import AttentionConfig, LatentConfig, ModelConfig, MoEConfig, RouterConfig, SharedConfig
from tedlab.models import GPT, GPTSpec
from tedlab.nn import ShardedModule, decay_groups, partial_parameters
from tedlab.optim import ShardedOptimizer
from tedlab.optim.bucket import holders, lay_out, local, reduction_group
from tedlab.predict.volumes import ClosedForm
from tedlab.spec import Layout, ParameterSpec
from tests.comm.test_ledger import configuration
from tests.pool import WorkerPool

LAYOUTS = [(1, 1, False), (2, 1, False), (1, 4, False), (2, 2, False), (2, 2, True), (4, 1, True)]
SIZES: dict[str, Any] = {"layers": 2, "hidden": 8, "heads": 4, "ffn": 16, "sequence_length": 4, "vocab_size": 32}
GPT3 = ModelConfig(**SIZES)
TODAY = ModelConfig(**SIZES, activation="swiglu", bias=False, norm="rms", positions="rotary", tie_embeddings=False)
GPT_OSS = ModelConfig(**SIZES, activation="clamped_swiglu", norm="rms", positions="rotary")
SHARED = MoEConfig(num_experts=4, every=1, first_dense=1, ffn=8, shared=SharedConfig(2, combine="cg1"))
SHORTCUT = replace(SHARED, every=2, first_dense=0, shared=SharedConfig(1, combine="cg2"), shortcut="pos2")
BIASED = replace(SHARED, router=RouterConfig(bias=True))
EXPERTS, DENSE = MoEConfig(num_experts=4), MoEConfig(num_experts=0)
Fact = tuple[str, tuple[int, ...], int, str, int, bool, bool]


def stated(model: ModelConfig, moe: MoEConfig, degrees: ParallelDegrees) -> list[Fact]:
    return [
        (
            *(p.name, p.shape, p.elements(degrees), p.group, degrees.world_size // p.parts(degrees)),
            *(p.partial(Layout(degrees)), p.decayed),
        )
        for p in GPTSpec(model, moe).parameters()
    ]


def found(model: ModelConfig, moe: MoEConfig, topology: Topology) -> list[Fact]:
    network = GPT(model, moe, topology, seed=0)
    partial, (decayed, _) = partial_parameters(network), decay_groups(network)
    return [
        (
            *(name, tuple(p.shape), local(p).numel(), reduction_group(p), holders(p, topology.comm)),
            *(p in partial, any(p is other for other in decayed)),
        )
        for name, p in network.named_parameters()
    ]


def reduced_together(topology: Topology, most: int) -> list[tuple[str, int, bool, int]]:
    """Buckets of an optimizer whose groups are made by name."""
    network = GPT(GPT3, EXPERTS, topology, seed=0)
    names = {p: name for name, p in network.named_parameters()}
    plain = [p for p, name in names.items() if "bias" in name or "norm" in name]
    optimizer = ShardedOptimizer(
        torch.optim.SGD([{"params": [p for p in names if p not in set(plain)]}, {"params": plain}], lr=0.1),
        topology.comm,
        names,
        partial=partial_parameters(network),
        zero=False,
        tile=None,
        bucket_elements=most,
    )
    return [(b.kind, holders(b.parameters[0], b.comm), b.partial, sum(b.sizes)) for b in optimizer.buckets]


KEYS = replace(TODAY, kv_heads=2, qk_norm="full", attention=AttentionConfig(qkv_bias=True, sinks=True))
LATENT = replace(TODAY, attention=AttentionConfig(latent=LatentConfig(3, 5, nope_dim=2, rope_dim=2, v_dim=3)))


def facts(layouts: list[tuple[int, int, bool]]) -> list[tuple[list[list[Fact]], list[Any]]]:
    topologies = [Topology(ParallelDegrees(4, *layout)) for layout in layouts]
    models = [(GPT3, EXPERTS), (TODAY, EXPERTS), (GPT3, DENSE), (TODAY, SHARED), (GPT_OSS, BIASED)]
    models += [(KEYS, DENSE), (LATENT, DENSE), (TODAY, SHORTCUT)]
    return [
        ([found(*model, topology) for model in models], [reduced_together(topology, most) for most in (200, 1 << 20)])
        for topology in topologies
    ]


@pytest.fixture(scope="module")
def real(pool: WorkerPool) -> dict[tuple[int, int, bool], tuple[list[list[Fact]], list[Any]]]:
    """Of models and optimizers in four processes."""
    return dict(zip(LAYOUTS, pool.run(4, facts, LAYOUTS)[0], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_model_s_parameters_are_those_that_its_specification_states(real: Any, layout: tuple[int, int, bool]) -> None:
    gpt3, today, dense, shared, gpt_oss, keys, latent, shortcut = real[layout][0]
    degrees = ParallelDegrees(4, *layout)
    assert gpt3 == stated(GPT3, EXPERTS, degrees)
    assert today == stated(TODAY, EXPERTS, degrees)
    assert dense == stated(GPT3, DENSE, degrees)
    assert shared == stated(TODAY, SHARED, degrees)
    assert gpt_oss == stated(GPT_OSS, BIASED, degrees)
    assert keys == stated(KEYS, DENSE, degrees)
    assert latent == stated(LATENT, DENSE, degrees)
    assert shortcut == stated(TODAY, SHORTCUT, degrees)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_closed_form_has_the_optimizer_s_buckets(real: Any, layout: tuple[int, int, bool]) -> None:
    tensor, expert, sequence = layout
    for most, buckets in zip((200, 1 << 20), real[layout][1], strict=True):
        config = configuration((4, tensor, expert), {"parallel.sequence": sequence, "optim.bucket_elements": most})
        config = replace(config, model=GPT3, moe=EXPERTS)
        assert [bucket[:4] for bucket in ClosedForm(config).buckets] == buckets


def test_parameters_by_hand() -> None:
    """Two blocks, experts in the second, two tensor ranks, two expert ranks."""
    facts = {name: rest for name, *rest in stated(GPT3, EXPERTS, ParallelDegrees(4, 2, 2, sequence=True))}
    assert len(facts) == 2 + 2 * (2 + 4 + 2) + 4 + (1 + 4) + 2
    assert facts["embedding.weight"] == [(32, 8), 128, "data", 2, False, True]
    assert facts["positions.weight"] == [(4, 8), 32, "data", 4, True, True]
    assert facts["blocks.0.norm1.bias"] == [(8,), 8, "data", 4, True, False]
    assert facts["blocks.0.attention.qkv.weight"] == [(24, 8), 96, "data", 2, False, True]
    assert facts["blocks.0.attention.out.bias"] == [(8,), 8, "data", 4, False, False]
    assert facts["blocks.0.feed_forward.down.weight"] == [(8, 16), 64, "data", 2, False, True]
    assert facts["blocks.1.feed_forward.router.weight"] == [(4, 8), 32, "data", 4, True, True]
    assert facts["blocks.1.feed_forward.experts.up"] == [(4, 8, 16), 128, "expert_data", 1, False, True]
    assert facts["blocks.1.feed_forward.experts.down_bias"] == [(4, 1, 8), 16, "expert_data", 2, False, False]


def test_parameters_of_attention_by_hand() -> None:
    """Two heads of keys on four tensor ranks, which all hold both, and one on each of two."""
    four, two = ({name: rest for name, *rest in stated(KEYS, DENSE, ParallelDegrees(4, tensor))} for tensor in (4, 2))
    attention = "blocks.0.attention."
    assert four[f"{attention}q.weight"] == [(8, 8), 16, "data", 1, False, True]
    assert four[f"{attention}kv.weight"] == [(8, 8), 64, "data", 4, True, True]
    assert four[f"{attention}kv.bias"] == [(8,), 8, "data", 4, True, False]
    assert four[f"{attention}q_norm.weight"] == [(8,), 2, "data", 1, False, False]
    assert four[f"{attention}k_norm.weight"] == [(4,), 4, "data", 4, True, False]
    assert four[f"{attention}sinks"] == [(4,), 1, "data", 1, False, False]
    assert two[f"{attention}kv.weight"] == [(8, 8), 32, "data", 2, False, True]
    latent = {name: rest for name, *rest in stated(LATENT, DENSE, ParallelDegrees(4, 2, sequence=True))}
    assert latent[f"{attention}kv_down.weight"] == [(5, 8), 40, "data", 4, True, True]
    assert latent[f"{attention}kv_norm.weight"] == [(3,), 3, "data", 4, True, False]
    assert latent[f"{attention}kv_up.weight"] == [(20, 3), 30, "data", 2, False, True]


def test_buckets_are_filled_in_order_until_the_next_does_not_fit() -> None:
    sizes = {"a": 3, "b": 9, "c": 2, "d": 2, "e": 5}
    buckets = lay_out(sizes, lambda name: (name in "be",), lambda name: sizes[name], most=5)
    assert list(buckets) == [((False,), ["a", "c"]), ((False,), ["d"]), ((True,), ["b"]), ((True,), ["e"])]


class Guest(nn.Module):
    """Layers of torch's, one of ours, and one that says what its name does not."""

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self.norm, self.linear, self.ours = nn.LayerNorm(2), nn.Linear(2, 2), ShardedModule()
        for name, decayed in (("scale", False), ("bias_table", True)):
            self.ours.add_parameter(ParameterSpec(name, (2,), decayed=decayed), topology)


def names_by_group() -> list[list[str]]:
    guest = Guest(Topology(ParallelDegrees(1)))
    names = {p: name for name, p in guest.named_parameters()}
    return [[names[p] for p in group] for group in decay_groups(guest)]


def test_weight_decay_follows_names_where_nothing_is_stated(pool: WorkerPool) -> None:
    assert pool.run(1, names_by_group)[0] == [
        ["linear.weight", "ours.bias_table"],
        ["norm.weight", "norm.bias", "linear.bias", "ours.scale"],
    ]
