"""Models with every form of attention: in every layout what one process computes, and as predicted."""

from collections.abc import Sequence
from typing import Any

import pytest

from tedlab.certify import Row
from tedlab.predict.cluster import load_cluster
from tedlab.predict.estimate import estimate
from tedlab.predict.sim import simulate
from tests.certify.runs import Case, certified
from tests.pool import WorkerPool
from tests.predict.sim.test_simulation import checked, out_of_the_pools_group
from tests.selection import asked_of

ROTARY = ("model=olmoe_1b_7b", "moe=olmoe", "model.qk_norm=none")
SHARED = (*ROTARY, "model.kv_heads=2", "model.qk_norm=full", "model.attention.qkv_bias=true")
GPT_OSS = (
    *(*ROTARY, "model.kv_heads=8", "model.head_dim=64", "model.attention.window=4", "model.attention.full_every=2"),
    *("model.attention.sinks=true", "model.bias=true", "model.rotary.scaling=yarn", "model.rotary.factor=4"),
    *("model.rotary.original_length=8", "model.rotary.truncate=false"),
)
LATENT = (
    *(*ROTARY, "model.attention.latent.kv_rank=512", "model.attention.latent.q_rank=1536"),
    *("model.rotary.scaling=yarn", "model.rotary.factor=40", "model.rotary.original_length=4096"),
    *("model.rotary.mscale=1", "model.rotary.mscale_all_dim=1"),
)
SEQUENCE = ("parallel.sequence=true", "model.recompute.granularity=block", "comm.cac=true")
COMPILED = ("moe.dispatch=capacity", "model.compile=aot_eager")
SHARDED_CAC = ("parallel.sequence=false", "model.recompute.granularity=block", "comm.cac=shard")
CELLS = {  # processes, tensor, expert, overrides
    "norms together, tensor 2 × expert 2": (4, 2, 2, (*ROTARY, "model.qk_norm=full")),
    "norms together, cac of shards": (4, 4, 1, (*ROTARY, "model.qk_norm=full", *SHARDED_CAC)),
    "keys shared by two ranks each": (4, 4, 1, SHARED),
    "keys shared, sequence of 4": (4, 4, 1, SHARED + SEQUENCE),
    "keys shared by four ranks, dtd, overlap": (
        *(8, 4, 2),
        (
            *SHARED,
            "model.kv_heads=1",
            "moe.dispatch=capacity",
            "comm=ted",
            "optim.overlap=true",
            "model.recompute.granularity=block",
        ),
    ),
    "windows and sinks, tensor 2 × expert 2": (4, 2, 2, GPT_OSS),
    "windows and sinks, sequence of 2 × expert 2": (4, 2, 2, GPT_OSS + SEQUENCE),
    "windows and sinks, keys shared": (4, 4, 1, (*GPT_OSS, "model.kv_heads=2")),
    "latents, tensor 2 × expert 2": (4, 2, 2, LATENT),
    "latents, sequence of 4": (4, 4, 1, LATENT + SEQUENCE),
    "latents, queries of activations, sequence": (
        *(4, 2, 2),
        (*LATENT, *SEQUENCE, "model.attention.latent.q_rank=null", "model.attention.qkv_bias=true"),
    ),
    "windows and sinks, compiled": (4, 2, 2, (*GPT_OSS, *COMPILED)),
    "keys shared, compiled": (2, 2, 1, (*SHARED, "model.kv_heads=1", *COMPILED, SEQUENCE[1], "comm.cac=true")),
    "latents, compiled": (4, 2, 2, (*LATENT, *COMPILED)),
    "latents, dtd": (4, 2, 2, (*LATENT, "moe.dispatch=capacity", "comm=ted", SEQUENCE[1], "optim.overlap=true")),
}
QUICK = "keys shared, sequence of 4"
EXHAUSTIVE = (  # what other cells have each by itself
    *("norms together, cac of shards", "keys shared by two ranks each", "windows and sinks, keys shared"),
    *("latents, sequence of 4", "windows and sinks, compiled", "latents, compiled"),
    *("keys shared by four ranks, dtd, overlap", "windows and sinks, tensor 2 × expert 2"),
    "latents, tensor 2 × expert 2",
)


def marked(cell: str) -> object:
    marks = [] if cell == QUICK else [pytest.mark.exhaustive if cell in EXHAUSTIVE else pytest.mark.slow]
    return pytest.param(cell, marks=marks)


def case(cell: str) -> Case:
    world, tensor, expert, further = CELLS[cell]
    degrees = (f"parallel.world_size={world}", f"parallel.tensor={tensor}", f"parallel.expert={expert}")
    further = (*further, f"data.batch_size={2 * world // tensor}", "data.micro_batch_size=2")
    return Case((*degrees, *further), continuations=("in one process",) if "shared, seq" in cell else ())


@pytest.fixture(scope="module")
def certificates(
    pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[Case, list[Row]]:
    """Of all cells that are tested, in few worlds."""
    asked = {item.callspec.params.get("cell") for item in request.session.items if hasattr(item, "callspec")}
    cells = [case(cell) for cell in CELLS if cell in asked]
    return certified(pool, tmp_path_factory.mktemp("attention"), cells)


@pytest.mark.parametrize("cell", [marked(each) for each in CELLS])
def test_a_layout_equals_one_process(certificates: dict[Case, list[Row]], cell: str) -> None:
    rows = certificates[case(cell)]
    assert {row.quantity for row in rows} >= {"losses and drops", "gradients", "next weights"}
    assert all(row.ok for row in rows), [str(row) for row in rows]


SMALL = [
    *("model.layers=4", "model.hidden=256", "model.heads=8", "model.head_dim=64", "model.ffn=512"),
    *("model.sequence_length=256", "model.vocab_size=2048", "moe.num_experts=16", "moe.top_k=2"),
    *("trainer.precision=bf16-true", "data.batch_size=64", "data.micro_batch_size=4"),
]
LATENT_SIZES = [
    *(f"model.attention.latent.{name}" for name in ("kv_rank=128", "q_rank=192", "nope_dim=64", "rope_dim=32")),
    "model.attention.latent.v_dim=64",
]
PREDICTED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "keys shared, normed together": (
        (*SHARED, "parallel.world_size=16", "parallel.tensor=4", "parallel.expert=4"),
        SEQUENCE,
    ),
    "windows and sinks": (
        (*GPT_OSS, "model.kv_heads=4", "parallel.world_size=16", "parallel.tensor=2", "parallel.expert=8"),
        ("model.attention.window=64",),
    ),
    "latents": (
        (*LATENT, "parallel.world_size=16", "parallel.tensor=4", "parallel.expert=4", *LATENT_SIZES),
        ("model.head_dim=null", *SEQUENCE),
    ),
    "latents, queries of activations": (
        (*LATENT, "parallel.world_size=16", "parallel.tensor=2", "parallel.expert=8", *LATENT_SIZES),
        ("model.head_dim=null", "model.attention.latent.q_rank=null"),
    ),
}


def differences(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of closed form and simulation, which checks its ledger against the closed form of communication."""
    found = {}
    with out_of_the_pools_group():
        for name in names:
            overrides = PREDICTED[name]
            config = checked(*overrides[0], *SMALL, *overrides[1])
            closed, simulation = (predicted(config, load_cluster("dgx_a100")) for predicted in (estimate, simulate))
            found[name] = {
                "memory": closed.memory.total / sum(simulation.memory.at_peak().values()) - 1,
                "time": closed.step_seconds / simulation.step_seconds - 1,
                "ledger": len(simulation.differences),
            }
    return found


@pytest.fixture(scope="module")
def predictions(pool: WorkerPool, request: pytest.FixtureRequest) -> Any:
    return pool.run(1, differences, [cell["name"] for cell in asked_of(request)])[0]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.exhaustive if "queries" in name else pytest.mark.slow) for name in PREDICTED],
)
def test_the_closed_form_says_what_the_simulator_says(predictions: Any, name: str) -> None:
    difference = predictions[name]
    assert difference["ledger"] == 0
    assert abs(difference["memory"]) < 0.06, difference
    assert abs(difference["time"]) < 0.04, difference
