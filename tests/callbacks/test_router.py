"""Router health of whole steps is the same in every layout, costs one collective when logged, and leaves a picture."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback
from matplotlib.image import imread

from tedlab.callbacks import RouterHealth, StepMetrics
from tedlab.comm import Collective
from tedlab.config import MoEConfig
from tests.pool import WorkerPool
from tests.training import Job, Layout, language_model, loader, trainer

STEPS, EVERY = 5, 2
JOB = Job(moe=MoEConfig(num_experts=8, top_k=2, every=1, capacity_factor=0.75, capacity_multiple=4), steps=STEPS)
LAYOUTS = [Layout(2, tensor=2), Layout(4, tensor=2, expert=2), Layout(4)]


class Counter(Callback):
    """After how many steps each reduction of metrics took place."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        def count(call: Collective, event: str) -> None:
            if call.tag == "metrics.reduce" and event == "start":
                self.steps.append(trainer.global_step)

        trainer.strategy.topology.comm.register_hook(count)


def train(layout: Layout, directory: Path, job: Job = JOB, picture_every: int | None = None) -> dict[str, Any]:
    routers, counter = RouterHealth(job.moe.routed(job.model.layers), directory, picture_every), Counter()
    fit = trainer(
        layout,
        job,
        max_steps=job.steps,
        log_every_n_steps=EVERY,
        callbacks=[StepMetrics(int.__sub__, int.__sub__), routers, counter],
        accumulate_grad_batches=job.micro_batches // layout.data,
    )
    fit.fit(language_model(job), loader(layout, job, fit.global_rank))
    logged = {name: value.item() for name, value in fit.callback_metrics.items()}
    return {"overall": routers.overall(), "logged": logged, "reductions": counter.steps}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the run in one process."""
    return tmp_path_factory.mktemp("single")


@pytest.fixture(scope="module")
def single(pool: WorkerPool, directory: Path) -> dict[str, Any]:
    """One process, which accumulates four micro-batches."""
    return pool.run(1, train, Layout(), directory)[0]


@pytest.fixture(scope="module")
def divided(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], tuple[Path, Any]]:
    """The directory of a layout's run, and what its processes return."""

    @cache
    def of(layout: Layout) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("divided")
        return folder, pool.run(layout.world_size, train, layout, folder)

    return of


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_reports_the_routers_of_one_process(
    divided: Callable[[Layout], tuple[Path, Any]], single: dict[str, Any], layout: Layout
) -> None:
    expected = single["overall"]
    assert 0.05 < expected["router/dropped_fraction"] < 0.6  # there is something to get wrong
    assert expected["router/early/load_cv"] != pytest.approx(expected["router/late/load_cv"], rel=1e-3)
    for rank in divided(layout)[1]:
        assert rank["overall"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("layout", [Layout(), Layout(4, tensor=2, expert=2)], ids=str)
def test_the_trace_has_the_choices_of_every_logged_step(
    divided: Callable[[Layout], tuple[Path, Any]], layout: Layout
) -> None:
    with np.load(divided(layout)[0] / "router_trace.npz") as trace:
        assert trace["step"].tolist() == [2, 4, STEPS]
        assert trace["load"].shape == (3, len(trace["block"]), 8)
        assert (trace["load"].sum(-1) == JOB.micro_batches * choices_of_a_micro_batch()).all()


def choices_of_a_micro_batch() -> int:
    (batch, *_) = loader(Layout(), JOB, 0)
    return batch[:, 1:].numel() * JOB.moe.top_k


def test_the_values_are_logged_beside_those_of_the_step(single: dict[str, Any]) -> None:
    logged, overall = single["logged"], single["overall"]
    assert overall.keys() < logged.keys()
    for name in overall.keys() - {"router/dropped_fraction"}:  # which StepMetrics logs, at logged steps
        assert logged[name] == pytest.approx(overall[name], rel=1e-6)  # Lightning keeps fp32
    assert "routers" not in logged
    assert logged["train/aux_loss"] > 0


def test_one_collective_when_metrics_are_logged_and_at_the_end_and_none_between(
    pool: WorkerPool, tmp_path: Path
) -> None:
    (first, _) = pool.run(2, train, Layout(2), tmp_path)
    metrics, routers = [2, 4], [2, 4, STEPS]
    assert first["reductions"] == sorted(metrics + routers)


@pytest.mark.usefixtures("single")
def test_the_picture_and_its_data_are_of_the_last_step(directory: Path) -> None:
    assert (directory / "router_load.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(directory / "router_load.png")
    assert min(pixels.shape[:2]) > 200
    assert pixels[..., :3].std() > 0.05  # something is drawn
    data = json.loads((directory / "router_load.json").read_text())
    assert (data["step"], data["blocks"]) == (STEPS, [0, 1])
    for loads in data["relative_load"]:
        assert len(loads) == 8
        assert sum(loads) == pytest.approx(8)


def draws(directory: Path) -> dict[int | None, list[int]]:
    """Steps of which a picture was drawn, by ``picture_every``."""
    drawn: dict[int | None, list[int]] = {None: [], 1: [], 3: [], 100: []}
    for every, steps in drawn.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tedlab.callbacks.router.draw_load", lambda load, blocks, step, file, s=steps: s.append(step))
            train(Layout(), directory, picture_every=every)
    return drawn


def test_a_picture_every_so_many_steps_as_soon_as_metrics_are_logged(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(1, draws, tmp_path) == [{None: [5], 1: [2, 4, 5], 3: [4, 5], 100: [5]}]


def test_a_dense_model_has_no_routers(pool: WorkerPool, tmp_path: Path) -> None:
    dense = pool.run(1, train, Layout(), tmp_path, Job(moe=MoEConfig(num_experts=0)))[0]
    assert dense["overall"] == {}
    assert list(tmp_path.iterdir()) == []
