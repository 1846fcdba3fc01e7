"""Published models in layouts: each equals one process, and predictions of it agree."""

from concurrent.futures import ThreadPoolExecutor
from math import prod

import pytest

from tedlab.certify import Row
from tedlab.commands.models import PUBLISHED
from tedlab.models import GPTSpec
from tedlab.predict.cluster import load_cluster
from tedlab.predict.estimate import estimate
from tedlab.predict.plan.plan import make_plan
from tedlab.predict.sim import simulate
from tests.certify.runs import Case, certified, composed
from tests.pool import WorkerPool
from tests.predict.sim.test_simulation import checked, out_of_the_pools_group
from tests.selection import asked_of

RECOMPUTED = "model.recompute.granularity=block"
LAYOUTS = {  # processes, tensor, expert; and further overrides
    "tensor 2 × expert 2": ((4, 2, 2), [RECOMPUTED]),
    "tensor 4": ((4, 4, 1), []),
    "expert 4": ((4, 1, 4), [RECOMPUTED]),
    "sequence of 2 × expert 2": ((4, 2, 2), ["parallel.sequence=true", RECOMPUTED, "comm.cac=true"]),
    "capacity, dtd": ((4, 2, 2), ["moe.dispatch=capacity", "comm=ted", RECOMPUTED]),
}
FAMILIES = {  # with the layout in which CI certifies it; Qwen3 has tests of its own
    "mixtral_8x7b": "capacity, dtd",
    "olmoe_1b_7b": "sequence of 2 × expert 2",
    "deepseek_v2_lite": "tensor 2 × expert 2",
    "deepseek_v3": "sequence of 2 × expert 2",
    "moonlight_16b": "expert 4",
    "gpt_oss_20b": "sequence of 2 × expert 2",
}
CELLS = [(preset, layout) for preset in FAMILIES for layout in LAYOUTS]
QUICK = ("mixtral_8x7b", "deepseek_v3", "gpt_oss_20b", "olmoe_1b_7b")  # of families that differ


def case(preset: str, layout: str) -> Case:
    (world, tensor, expert), further = LAYOUTS[layout]
    degrees = [f"parallel.world_size={world}", f"parallel.tensor={tensor}", f"parallel.expert={expert}"]
    batch = [f"data.batch_size={2 * world // tensor}", "data.micro_batch_size=2"]
    return Case((f"preset={preset}", *degrees, *batch, *further))


def marked(preset: str, layout: str) -> object:
    """CI certifies one layout of each family."""
    quick = preset in QUICK and FAMILIES[preset] == layout
    return pytest.param(preset, layout, marks=pytest.mark.slow if quick else pytest.mark.exhaustive)


@pytest.fixture(scope="module")
def certificates(
    pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[Case, list[Row]]:
    """Of all cells that this session runs, in few worlds."""
    cells = [case(cell["preset"], cell["layout"]) for cell in asked_of(request)]
    return certified(pool, tmp_path_factory.mktemp("families"), cells)


@pytest.mark.timeout(900)  # the first cell waits for all of them
@pytest.mark.parametrize(("preset", "layout"), [marked(*cell) for cell in CELLS])
def test_a_layout_of_a_published_model_equals_one_process(
    certificates: dict[Case, list[Row]], preset: str, layout: str
) -> None:
    rows = certificates[case(preset, layout)]
    assert {row.quantity for row in rows} >= {"losses and drops", "gradients", "next weights"}
    assert all(row.ok for row in rows), [str(row) for row in rows if not row.ok]


# ---- predictions -------------------------------------------------------------------------------------------------

CLUSTER = "dgx_a100"
COMMON = ["model.hidden=256", "model.layers=4", "model.heads=8", "model.sequence_length=256", "model.vocab_size=2048"]
COMMON += ["trainer=gpu", "trainer.precision=bf16-true", "data.batch_size=64", "data.micro_batch_size=4"]
SHARED = ["model.kv_heads=4", "model.head_dim=32"]
LATENT = [f"model.attention.latent.{name}" for name in ("q_rank=192", "kv_rank=128", "nope_dim=32", "v_dim=32")]
SIZES = {
    "mixtral_8x7b": ["model.kv_heads=4", "model.ffn=512"],
    "olmoe_1b_7b": ["model.ffn=256"],
    "qwen3_30b_a3b": [*SHARED, "model.ffn=256", "moe.num_experts=32"],
    "deepseek_v3": [*LATENT, "model.ffn=1024", "moe.first_dense=1", "moe.ffn=256", "moe.num_experts=32"],
    "gpt_oss_20b": [*SHARED, "model.ffn=256", "model.attention.window=64"],
}
WORLDS = {  # with the largest difference of memory: at these sizes, routers' small tensors count
    "all experts in one process": (["parallel.world_size=8", "parallel.tensor=1", "parallel.expert=1"], 0.02),
    "divided": (["parallel.world_size=32", "parallel.tensor=4", "parallel.expert=8"], 0.09),
}


FAMILIES_IN_WORLDS = [(family, world) for family in SIZES for world in WORLDS]


def differences(of: list[tuple[str, str]]) -> dict[tuple[str, str], tuple[float, float, int]]:
    """Of closed form and simulation: memory, time, and collectives."""
    found, cluster = {}, load_cluster(CLUSTER)
    with out_of_the_pools_group():
        for family, world in of:
            config = checked(f"preset={family}", *COMMON, *SIZES[family], *WORLDS[world][0])
            closed, simulation = estimate(config, cluster), simulate(config, cluster)
            memory = closed.memory.total / sum(simulation.memory.at_peak().values()) - 1
            time = closed.step_seconds / simulation.step_seconds - 1
            found[family, world] = memory, time, len(simulation.differences)
    return found


@pytest.mark.parametrize(
    "of",
    [  # CI: a family in one of the worlds; Qwen3 has tests of its own
        pytest.param(FAMILIES_IN_WORLDS[::3], marks=pytest.mark.slow, id="sample"),
        pytest.param(FAMILIES_IN_WORLDS, marks=pytest.mark.exhaustive, id="all"),
    ],
)
def test_the_closed_form_says_what_the_simulator_says(pool: WorkerPool, of: list[tuple[str, str]]) -> None:
    for (family, world), (memory, time, collectives) in pool.run(1, differences, of, timeout=250)[0].items():
        assert abs(memory) < WORLDS[world][1], (family, world, memory)
        assert abs(time) < 0.03, (family, world, time)
        assert collectives == 0, (family, world)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_every_preset_can_be_estimated(preset: str) -> None:
    """With a process's share of its parameters, in bf16; norms and the first products of latents are not divided."""
    job = ["trainer=gpu", "trainer.precision=bf16-true", "data.batch_size=256", "data.micro_batch_size=1"]
    config = checked(f"preset={preset}", *job, "parallel.world_size=64", "parallel.tensor=4", "parallel.expert=8")
    found = estimate(config, load_cluster("dgx_h100"))
    parameters = GPTSpec(config.model, config.moe).parameters()
    held = sum(2 * prod(p.shape) // (4 * (8 if p.mesh == "expert" else 1)) for p in parameters)
    assert held <= found.memory.held["parameters"] < 1.05 * held
    assert 0 < found.mfu < 1


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param("deepseek_v3_tiny", marks=pytest.mark.slow),
        pytest.param("gpt_oss_20b_tiny", marks=pytest.mark.exhaustive),
    ],
)
def test_plan_takes_what_train_takes(preset: str) -> None:
    """SwiGLU, RMSNorm, rotary positions, products without biases, and all that these models have beside them."""
    job = ["trainer=gpu", "trainer.precision=bf16-true", "data.batch_size=8", "parallel.world_size=4"]
    plan = make_plan(
        composed(f"preset={preset}", *job), load_cluster(CLUSTER), ThreadPoolExecutor(1), reserve=2**30, simulations=1
    )
    assert plan.winner.settings["parallel.tensor"] in (1, 2, 4)
    assert not [reason for reason in plan.found.refused if "kernels" in reason or "not built" in reason]
