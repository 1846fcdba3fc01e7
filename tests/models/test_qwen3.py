"""Grouped-query attention with free heads and norms of queries and keys: Qwen3-MoE, in every layout."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tedlab import ParallelDegrees, Topology
from tedlab.certify import Row
from tedlab.certify.compare import relative_error
from tedlab.config import ModelConfig, with_values
from tedlab.errors import UsageError
from tedlab.models import GPT, GPTSpec
from tedlab.nn import with_heads
from tedlab.predict.cluster import load_cluster
from tedlab.predict.estimate import estimate
from tedlab.predict.sim import simulate
from tedlab.validate import check_simulated
from tests.certify.runs import Case, certified, composed
from tests.pool import WorkerPool
from tests.predict.sim.test_simulation import checked, out_of_the_pools_group
from tests.test_transformers import SinglePrecisionIsDouble

QWEN3 = ["model=qwen3_30b_a3b", "moe=qwen3"]
LAYOUTS = {  # processes, tensor, expert: further overrides
    "tensor 2 × expert 2": ((4, 2, 2), []),
    "tensor 4": ((4, 4, 1), []),
    "expert 4": ((4, 1, 4), []),
    "sequence of 2 × expert 2": ((4, 2, 2), ["parallel.sequence=true"]),
    "sequence of 4": ((4, 4, 1), ["parallel.sequence=true", "model.recompute.granularity=block", "comm.cac=true"]),
    "capacity, dtd": ((4, 2, 2), ["moe.dispatch=capacity", "comm=ted", "model.recompute.granularity=block"]),
}


def case(layout: str) -> Case:
    (world, tensor, expert), further = LAYOUTS[layout]
    degrees = [f"parallel.world_size={world}", f"parallel.tensor={tensor}", f"parallel.expert={expert}"]
    return Case((*QWEN3, *degrees, f"data.batch_size={2 * world // tensor}", "data.micro_batch_size=2", *further))


QUICK = "sequence of 2 × expert 2"


@pytest.fixture(scope="module")
def certificates(
    pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[Case, list[Row]]:
    """Of all layouts that are tested, in few worlds."""
    slow = any("slow" in item.keywords for item in request.session.items)
    return certified(pool, tmp_path_factory.mktemp("qwen3"), [case(each) for each in LAYOUTS if slow or each == QUICK])


@pytest.mark.parametrize("layout", [pytest.param(each, marks=[pytest.mark.slow] * (each != QUICK)) for each in LAYOUTS])
def test_a_layout_equals_one_process(certificates: dict[Case, list[Row]], layout: str) -> None:
    rows = certificates[case(layout)]
    assert {row.quantity for row in rows} >= {"losses and drops", "gradients", "next weights"}
    assert all(row.ok for row in rows), [str(row) for row in rows]


def test_the_certified_model_has_what_the_large_one_has() -> None:
    small = with_heads(composed(*QWEN3).model, 12, 4, 4)
    assert (small.heads, small.kv_heads, small.hidden, small.head_dim, small.qk_norm) == (12, 4, 48, 8, "head")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["parallel.tensor=4", "model.kv_heads=6", "model.heads=12"],
            r"model.kv_heads \(6\) is neither .* parallel.tensor \(4\).*can be 1, 2, 3, 6, 12$",
        ),
        (["model.kv_heads=5"], r"model.heads \(32\) .* model.kv_heads \(5\).*can be 1, 2, 4, 8, 16, 32$"),
        (["model.head_dim=7"], r"model.head_dim = 7 is odd"),
    ],
)
def test_heads_that_do_not_divide_are_refused(overrides: list[str], message: str) -> None:
    world = ["parallel.world_size=8", "parallel.expert=1", "data.batch_size=8", "data.micro_batch_size=1"]
    with pytest.raises(UsageError, match=message):
        check_simulated(composed(*QWEN3, *world, *overrides))


SMALL = [*QWEN3, "model.layers=4", "model.hidden=256", "model.heads=8", "model.head_dim=64", "model.ffn=512"]
SMALL += ["model.sequence_length=256", "model.vocab_size=2048", "moe.num_experts=16", "moe.top_k=2"]
SMALL += ["trainer.precision=bf16-true", "data.batch_size=64", "data.micro_batch_size=4"]
SEQUENCE = ("parallel.sequence=true", "model.recompute.granularity=block", "comm.cac=true")
SIMULATED = [
    ["parallel.world_size=64", "parallel.tensor=4", "parallel.expert=16"],
    ["parallel.world_size=16", "parallel.tensor=2", "parallel.expert=8", *SEQUENCE],
]


def differences() -> list[dict[str, float]]:
    """Of closed form and simulation, which checks its ledger against the closed form of communication."""
    found = []
    with out_of_the_pools_group():
        for overrides in SIMULATED:
            config = checked(*SMALL, *overrides)
            closed, simulation = (predicted(config, load_cluster("dgx_a100")) for predicted in (estimate, simulate))
            found.append(
                {
                    "memory": closed.memory.total / sum(simulation.memory.at_peak().values()) - 1,
                    "time": closed.step_seconds / simulation.step_seconds - 1,
                    "ledger": len(simulation.differences),
                }
            )
    return found


@pytest.mark.slow
def test_the_closed_form_says_what_the_simulator_says(pool: WorkerPool) -> None:
    for difference in pool.run(1, differences)[0]:
        assert abs(difference["memory"]) < 0.06, difference
        assert abs(difference["time"]) < 0.04, difference
        assert difference["ledger"] == 0


# ---- beside transformers -----------------------------------------------------------------------------------------


def peer(model: ModelConfig, moe: Any) -> Any:
    """transformers' configuration of the same model."""
    return pytest.importorskip("transformers").Qwen3MoeConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
        rms_norm_eps=model.norm_eps,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=model.ffn,
        decoder_sparse_step=moe.every,
        norm_topk_prob=True,
        tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
    )


def taken_over(theirs: dict[str, Tensor], heads: int, kv_heads: int) -> dict[str, Tensor]:
    """Their weights, or gradients, by our names."""
    ours = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "output.weight": theirs["lm_head.weight"],
    }
    for i in range(sum(name.endswith("o_proj.weight") for name in theirs)):
        layer = {
            k.removeprefix(f"model.layers.{i}."): v for k, v in theirs.items() if k.startswith(f"model.layers.{i}.")
        }
        q, k, v = (layer[f"self_attn.{part}_proj.weight"].unflatten(0, (kv_heads, -1)) for part in "qkv")
        gate, linear = layer["mlp.experts.gate_up_proj"].chunk(2, 1)
        named = {
            "norm1.weight": layer["input_layernorm.weight"],
            "attention.q.weight": q.flatten(0, 1),
            "attention.kv.weight": torch.cat((k, v), 1).flatten(0, 1),  # head by head
            "attention.q_norm.weight": layer["self_attn.q_norm.weight"],
            "attention.k_norm.weight": layer["self_attn.k_norm.weight"],
            "attention.out.weight": layer["self_attn.o_proj.weight"],
            "norm2.weight": layer["post_attention_layernorm.weight"],
            "feed_forward.router.weight": layer["mlp.gate.weight"],
            "feed_forward.experts.up": torch.stack((gate, linear), 2).flatten(1, 2).mT,  # feature by feature
            "feed_forward.experts.down": layer["mlp.experts.down_proj"].mT,
        }
        ours |= {f"blocks.{i}.{name}": value for name, value in named.items()}
    return ours


@pytest.mark.slow
def test_logits_and_gradients_are_those_of_transformers(single: Topology) -> None:
    sizes = {"layers": 2, "hidden": 24, "heads": 6, "kv_heads": 2, "head_dim": 8, "ffn": 20, "sequence_length": 16}
    config = composed(*QWEN3, *(f"model.{name}={size}" for name, size in sizes.items()), "model.vocab_size=50")
    config = with_values(config, {"moe.num_experts": 8, "moe.top_k": 3})
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (3, 17), generator=draw)
    tokens, targets = ids[:, :-1], ids[:, 1:].flatten()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with SinglePrecisionIsDouble():
            theirs = AutoModelForCausalLM.from_config(
                peer(config.model, config.moe),
                attn_implementation="eager",
                experts_implementation="eager",
                dtype=torch.float64,
            ).train()
            for parameter in theirs.parameters():
                parameter.data.normal_(0.3, 0.5, generator=draw)
            their_logits = theirs(input_ids=tokens).logits
            nn.functional.cross_entropy(their_logits.flatten(0, 1), targets).backward()
        ours = GPT(config.model, config.moe, single, seed=0)
        own: dict[str, Any] = dict(ours.named_parameters())
        weights = taken_over(theirs.state_dict(), 6, 2)
        assert weights.keys() == own.keys()
        for name, value in weights.items():
            own[name].detach().to_local().copy_(value)
        logits = ours(tokens)[0]
        nn.functional.cross_entropy(logits.flatten(0, 1), targets).backward()
    finally:
        torch.set_default_dtype(default)
    assert relative_error(logits.detach(), their_logits.detach()) < 1e-12
    gradients = taken_over({name: p.grad for name, p in theirs.named_parameters()}, 6, 2)
    wrong = {name: relative_error(own[name].grad.to_local(), value) for name, value in gradients.items()}
    assert max(wrong.values()) < 1e-10, wrong


@pytest.mark.slow
def test_the_preset_has_the_parameters_of_the_published_model() -> None:
    """30,532,122,624, which Qwen rounds to 30.5 billion; transformers counts them without making any."""
    transformers = pytest.importorskip("transformers")
    config = composed(*QWEN3)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(peer(config.model, config.moe))
    counted = sum(parameter.numel() for parameter in theirs.parameters())
    stated = sum(torch.Size(p.shape).numel() for p in GPTSpec(config.model, config.moe).parameters())
    assert stated == counted == 30_532_122_624


def test_norms_of_heads_are_shared_by_all_tensor_ranks_and_their_gradients_summed() -> None:
    config = composed(*QWEN3)
    named = {p.name: p for p in GPTSpec(config.model, config.moe).parameters()}
    norm = named["blocks.0.attention.q_norm.weight"]
    assert norm.shape == (128,)
    assert norm.elements(ParallelDegrees(4, 4)) == 128
    assert not norm.decayed
