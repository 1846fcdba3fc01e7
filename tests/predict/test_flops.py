"""The closed form counts what torch counts, and every device gets the peak of its data sheet."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tedlab.capacity import expert_capacity
from tedlab.config import AttentionConfig, GroupConfig, LatentConfig, ModelConfig, MoEConfig, RouterConfig, SharedConfig
from tedlab.models import GPT, GPTSpec
from tedlab.optim import Grouping
from tedlab.predict.flops import forward_flops, peak_flops, training_flops, weight_flops
from tedlab.topology import Topology

MODEL = ModelConfig(layers=3, hidden=16, heads=4, ffn=40, sequence_length=12, vocab_size=64)
SAMPLES = 2
TOKENS = SAMPLES * MODEL.sequence_length
MIXTURES = {
    "dense": MoEConfig(num_experts=0),
    "top1": MoEConfig(num_experts=4, capacity_factor=None),
    "top2_everywhere": MoEConfig(num_experts=8, top_k=2, every=1, capacity_factor=None),
}


TODAY = replace(MODEL, activation="swiglu", bias=False, norm="rms", positions="rotary")


def counted(
    model: ModelConfig, moe: MoEConfig, topology: Topology, groups: Sequence[GroupConfig] = ()
) -> tuple[int, int]:
    """FLOPs of matrix products that torch sees in forward and in backward."""
    network = GPT(model, moe, topology, seed=0)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(Grouping(groups).trains(name))
    ids = torch.randint(64, (SAMPLES, MODEL.sequence_length))
    # Only this attention shows the counter its products, in backward, too.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits, _ = network(ids)
        forward = counter.get_total_flops()
        logits.sum().backward()
    return forward, counter.get_total_flops() - forward


VISIBLE = {
    "a window": replace(TODAY, kv_heads=2, attention=AttentionConfig(window=6, full_every=2)),
    "sinks": replace(TODAY, attention=AttentionConfig(sinks=True)),
    "latents": replace(TODAY, attention=AttentionConfig(latent=LatentConfig(5, 6, nope_dim=3, rope_dim=4, v_dim=9))),
}


@pytest.mark.parametrize("name", VISIBLE)
def test_scores_that_are_not_seen_count_nowhere(name: str, single: Topology) -> None:
    """Nor are they computed, but for those in a block of queries: torch counts what the operation says of itself."""
    model, dense = VISIBLE[name], MIXTURES["dense"]
    parts, plain = forward_flops(model, dense), replace(TODAY, kv_heads=model.kv_heads)
    forward, _ = counted(model, dense, single)
    full = model.layers * 2 * 12 * 16  # pairs of a token, half of its text, times four, for 16 features
    if name == "latents":
        assert parts["attention_scores"] == full // 16 * 4 * (7 + 9) // 2
    elif name == "sinks":
        assert parts == forward_flops(plain, dense)
    else:
        assert parts["attention_scores"] == full // 3 + 2 * (full // 3) * 3 // 4  # 54 of 72 pairs in two blocks
        masked = TOKENS * full // 3  # of the block without a window, whose products torch counts
        forward -= masked
    assert forward == TOKENS * sum(parts.values())


@pytest.mark.parametrize("model", [MODEL, TODAY], ids=["gpt", "today"])
@pytest.mark.parametrize("moe", MIXTURES.values(), ids=MIXTURES)
def test_the_closed_form_is_what_torch_counts_but_for_masked_scores_and_empty_slots(
    model: ModelConfig, moe: MoEConfig, single: Topology
) -> None:
    parts = forward_flops(model, moe)
    masked = TOKENS * parts["attention_scores"]  # torch counts tokens that come later as well: the other half
    slots = moe.num_experts * expert_capacity(TOKENS, max(1, moe.num_experts), moe.top_k, None, moe.capacity_multiple)
    empty = parts["experts"] // moe.top_k * (slots - moe.top_k * TOKENS)
    forward, backward = counted(model, moe, single)
    assert forward == TOKENS * sum(parts.values()) + masked + empty
    assert backward == 2 * forward
    assert training_flops(model, moe) == 3 * sum(parts.values())


@pytest.mark.parametrize("frozen", ["nothing", "*.experts.*", "*.router.*"])
def test_two_gates_take_twice_the_flops_of_router_and_experts(frozen: str, single: Topology) -> None:
    moe, groups = replace(MIXTURES["top1"], dispatch="dropless"), [GroupConfig(pattern=frozen, frozen=True)]
    twice, groups = replace(moe, shortcut="dgmoe"), [] if frozen == "nothing" else groups
    parts, of_one = forward_flops(TODAY, twice), forward_flops(TODAY, moe)
    assert parts - of_one == {"routers": of_one["routers"], "experts": of_one["experts"]}
    masked = TOKENS * parts["attention_scores"]
    forward, backward = counted(TODAY, twice, single, groups)
    assert forward == TOKENS * sum(parts.values()) + masked
    assert forward + backward == TOKENS * training_flops(TODAY, twice, groups) + 3 * masked


BEFORE = [GroupConfig(pattern=f"{name}.*", frozen=True) for name in ("embedding", "positions", "blocks.0")]
FROZEN: dict[str, tuple[list[GroupConfig], int]] = {  # and how many of three blocks the backward pass reaches
    "routers": ([GroupConfig(pattern="*.router.*", frozen=True)], 3),
    "experts": ([GroupConfig(pattern="*.experts.*", frozen=True)], 3),
    "attention": ([GroupConfig(pattern="*.attention.*", frozen=True)], 3),
    "before": (BEFORE, 2),
    "all_but_experts": ([GroupConfig(pattern="*.experts.*"), GroupConfig(pattern="*", frozen=True)], 2),
    "all_but_the_last_norm": ([GroupConfig(pattern="norm.*"), GroupConfig(pattern="*", frozen=True)], 0),
}


@pytest.mark.parametrize(("tied", "dispatch"), [(True, "capacity"), (False, "capacity"), (False, "dropless")])
@pytest.mark.parametrize("case", FROZEN)
def test_a_backward_pass_computes_no_gradient_of_what_is_frozen(
    case: str, tied: bool, dispatch: str, single: Topology
) -> None:
    """As torch counts it, see above; experts are in the second block."""
    (groups, reached), moe = FROZEN[case], replace(MIXTURES["top1"], dispatch=dispatch)
    # Without a capacity sums of biases' gradients are products, with a matrix that says which rows are of which expert.
    model = replace(MODEL, tie_embeddings=tied, bias=dispatch == "capacity")
    parts = forward_flops(model, moe)
    masked = TOKENS * parts["attention_scores"] * reached // model.layers
    slots = moe.num_experts * expert_capacity(TOKENS, moe.num_experts, moe.top_k, None, moe.capacity_multiple)
    empty = parts["experts"] // moe.top_k * (slots - moe.top_k * TOKENS) if dispatch == "capacity" else 0
    passes = 0 if reached < 2 else 1 if case == "experts" else 2  # of the gradients of rows and weights
    _, backward = counted(model, moe, single, groups)
    forward = sum(parts.values())
    assert backward == TOKENS * (training_flops(model, moe, groups) - forward) + 2 * masked + passes * empty


LIKE: dict[str, tuple[ModelConfig, MoEConfig]] = {
    "gpt": (MODEL, MIXTURES["top2_everywhere"]),
    "qwen3": (
        replace(TODAY, kv_heads=2, head_dim=6, qk_norm="head", tie_embeddings=False),
        MoEConfig(num_experts=8, top_k=3, every=1, ffn=24),
    ),
    "gated_shared": (
        TODAY,
        MoEConfig(num_experts=4, top_k=2, first_dense=1, shared=SharedConfig(2, 24, combine="cg1")),
    ),
    "deepseek": (
        replace(TODAY, attention=AttentionConfig(latent=LatentConfig(6, 4, 4, 2, 3))),
        MoEConfig(num_experts=4, top_k=2, first_dense=1, shared=SharedConfig(1, 24)),
    ),
    "gpt_oss": (
        replace(MODEL, activation="clamped_swiglu", attention=AttentionConfig(sinks=True)),
        MoEConfig(num_experts=4, top_k=2, router=RouterConfig(bias=True)),
    ),
}


@pytest.mark.parametrize("case", LIKE)
def test_products_with_matrices_are_all_flops_but_those_of_attention(case: str) -> None:
    """What the backward pass leaves out for a frozen matrix is a part of these."""
    model, moe = LIKE[case]
    spec = GPTSpec(model, moe)
    products = sum(weight_flops(p, moe) for block in spec.blocks for p in block.parameters())
    parts = forward_flops(model, moe)
    assert products + parts["output"] == parts.total() - parts["attention_scores"]


def test_the_closed_form_by_hand() -> None:
    """hidden 16, ffn 40, 12 positions; of three blocks the second has experts, two of eight for each token."""
    moe = MoEConfig(num_experts=8, top_k=2)
    assert forward_flops(MODEL, moe) == {
        "attention_projections": 3 * 2 * (16 * 48 + 16 * 16),
        "attention_scores": 3 * 2 * 12 * 16,
        "feed_forward": 2 * 2 * 2 * 16 * 40,
        "experts": 2 * 2 * 2 * 16 * 40,
        "routers": 2 * 16 * 8,
        "output": 2 * 16 * 64,
    }


@pytest.mark.parametrize(
    ("device", "precision", "tera"),
    [
        ("Tesla V100-SXM2-32GB", "16-mixed", 125.0),
        ("Tesla V100-SXM2-32GB", "bf16-true", None),  # it has no bf16
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312.0),
        ("NVIDIA A100 80GB PCIe", "32-true", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16-true", 989.5),
        ("NVIDIA H100 80GB HBM3", "32-true", 67.0),
        ("NVIDIA H100 PCIe", "16-true", 756.5),
        ("NVIDIA H200", "bf16-true", 989.5),
        ("NVIDIA H200 NVL", "bf16-true", 835.5),
        ("NVIDIA B200", "16-mixed", 2250.0),
        ("AMD Instinct MI250X", "bf16-true", 191.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16-true", None),  # a seventh of one
        ("NVIDIA H100 80GB HBM3", "64-true", None),
        ("NVIDIA GB200", "bf16-true", None),  # not a B200
        ("NVIDIA GeForce RTX 3090", "bf16-true", None),
    ],
)
def test_the_peak_of_a_device_by_precision(device: str, precision: str, tera: float | None) -> None:
    assert peak_flops(device, precision) == (None if tera is None else pytest.approx(tera * 1e12))
