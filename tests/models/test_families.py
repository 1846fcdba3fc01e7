"""Published models in layouts: each equals one process, and predictions of it agree."""

from pathlib import Path

import pytest

from tedlab.certify import Row
from tests.certify.runs import Case, certified
from tests.pool import WorkerPool
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
