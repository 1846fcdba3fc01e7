"""A record of routing says which experts each token went to, in any layout, and can be replayed in any other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback

from tedlab.callbacks import RecordRouting, ReplayRouting, StepMetrics
from tedlab.config import MoEConfig, RouterConfig
from tedlab.record import RECORD_META, Recording, Shape, flip_rates
from tedlab.validate.routing import check_replay
from tests.pool import WorkerPool
from tests.test_conf import compose
from tests.training import MICRO_BATCH, SEQUENCE, Job, Layout, language_model, loader, trainer

STEPS = 2
MOE = MoEConfig(num_experts=8, top_k=2, every=1, capacity_factor=None, capacity_multiple=1)
JOB = Job(moe=MOE, steps=STEPS, micro_batches=4)
SHAPE = Shape((0, 1), 8, 2, JOB.micro_batches * MICRO_BATCH * SEQUENCE)


class Flips(Callback):
    """What was logged of flips."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if "router/flip_rate" in trainer.callback_metrics:
            self.rates.append(trainer.callback_metrics["router/flip_rate"].item())


def train(layout: Layout, job: Job, record: Path | None = None, replay: Path | None = None) -> dict[str, Any]:
    """Losses of the last step and logged flips of a run that records, replays, or both."""
    flips = Flips()
    callbacks: list[Callback] = [StepMetrics(int.__sub__, int.__sub__)]
    callbacks += [] if record is None else [RecordRouting(record, SHAPE)]
    callbacks += [] if replay is None else [ReplayRouting(replay), flips]
    fit = trainer(
        layout,
        job,
        max_steps=job.steps,
        log_every_n_steps=1,
        callbacks=callbacks,
        accumulate_grad_batches=job.micro_batches // layout.data,
    )
    fit.fit(language_model(job), loader(layout, job, fit.global_rank))
    return {"loss": fit.callback_metrics["train/loss"].item(), "flips": flips.rates}


def choices(directory: Path) -> list[np.ndarray]:
    recording = Recording(directory)
    assert recording.steps == list(range(1, STEPS + 1))
    return [recording.choices(step) for step in recording.steps]


@pytest.fixture(scope="module")
def record(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process."""
    directory = tmp_path_factory.mktemp("one") / "routing"
    pool.run(1, train, Layout(), JOB, directory)
    return directory


@pytest.mark.parametrize("layout", [Layout(2, tensor=2), Layout(4, tensor=2, expert=2), Layout(4)], ids=str)
def test_every_layout_records_the_same_and_replays_another_layouts_without_a_flip(
    pool: WorkerPool, record: Path, tmp_path: Path, layout: Layout
) -> None:
    answers = pool.run(layout.world_size, train, layout, JOB, tmp_path / "routing", record)
    for ours, theirs in zip(choices(tmp_path / "routing"), choices(record), strict=True):
        assert np.array_equal(ours, theirs)
    assert answers[0]["flips"][-1] == 0.0


def test_a_record_decides_for_other_weights_and_the_flips_are_counted(
    pool: WorkerPool, record: Path, tmp_path: Path
) -> None:
    other = replace(JOB, seed=1)
    (free,) = pool.run(1, train, Layout(), other, tmp_path / "free")
    answers = pool.run(2, train, Layout(2), other, tmp_path / "bound", record)
    for ours, theirs in zip(choices(tmp_path / "bound"), choices(record), strict=True):
        assert np.array_equal(ours, theirs)
    assert answers[0]["loss"] != free["loss"]
    # In the first step both had the weights of the other seed, and so the same choices of their own.
    flipped = flip_rates(Recording(record), Recording(tmp_path / "free"))[1].mean()
    assert flipped > 0.3
    assert answers[0]["flips"][0] == pytest.approx(flipped)


def test_noise_does_not_change_what_is_replayed(pool: WorkerPool, record: Path, tmp_path: Path) -> None:
    noisy = replace(JOB, moe=replace(MOE, router=RouterConfig(noise="gumbel")))
    (answer,) = pool.run(1, train, Layout(), noisy, tmp_path / "routing", record)
    (quiet,) = pool.run(1, train, Layout(), JOB)
    assert answer["loss"] == quiet["loss"]
    assert answer["flips"][0] > 0.1


def test_flips_are_counted_by_hand(tmp_path: Path) -> None:
    for name, choice in (("a", [[0, 1], [2, 3]]), ("b", [[1, 0], [2, 0]])):
        written(tmp_path / name, [0, 1], [choice])
    (rates,) = flip_rates(Recording(tmp_path / "a"), Recording(tmp_path / "b")).values()
    assert rates.tolist() == [0.25]  # one of four choices; order does not count


def written(directory: Path, token: list[int], choice: list[Any], experts: int = 4) -> Path:
    directory.mkdir()
    meta = {"blocks": [0], "experts": experts, "top_k": 2, "tokens": 2}
    (directory / RECORD_META).write_text(json.dumps(meta))
    np.savez(directory / "step-00000001-rank-0000.npz", token=np.array(token), choice=np.array(choice))
    return directory


@pytest.mark.parametrize(
    ("token", "choice", "said"),
    [
        ([0], [[[0, 1]]], "lacks 1 of 2 tokens in step 1"),
        ([0, 7], [[[0, 1], [2, 3]]], "damaged or of another record"),
        ([0, 1], [[[0, 1], [2, 9]]], "beyond 0 to 3"),
        ([0, 1], [[[0, 1], [2, -3]]], "beyond 0 to 3"),
        ([0, 1], [[[0, 1, 2], [2, 3, 1]]], "damaged or of another record"),
    ],
)
def test_a_damaged_record_says_what_is_wrong(tmp_path: Path, token: list[int], choice: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Recording(written(tmp_path / "r", token, choice)).choices(1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["moe.num_experts=8"], "experts: 4 in the record, 8 here"),
        (["moe.top_k=1"], "top_k: 2 in the record, 1 here"),
        (["data.batch_size=4"], "tokens per step: 32 in the record, 16 here"),
        (["trainer.max_steps=3"], "has steps 1 to 2, and this run needs 3 to 3"),
    ],
)
def test_a_record_of_another_shape_or_a_shorter_run_is_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    shape = ["model.layers=2", "moe.num_experts=4", "moe.top_k=2", "model.sequence_length=4", "data.batch_size=8"]
    config = compose(*shape, "trainer.max_steps=2", *overrides, f"routing.replay={tmp_path}")
    (tmp_path / RECORD_META).write_text(json.dumps({"blocks": [1], "experts": 4, "top_k": 2, "tokens": 32}))
    for step in (1, 2):
        (tmp_path / f"step-{step:08d}-rank-0000.npz").touch()
    with pytest.raises(ValueError, match=said):
        check_replay(config, taken=0)


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    for content in ("", "[]", '{"blocks": "x"}', '{"blocks": [0], "experts": 4}'):
        (tmp_path / RECORD_META).write_text(content)
        with pytest.raises(ValueError, match="is not the record of a run's routing"):
            Recording(tmp_path)
    with pytest.raises(ValueError, match="is not the record of a run's routing"):
        Recording(tmp_path / "missing")
    record = written(tmp_path / "r", [0, 1], [[[0, 1], [2, 3]]])
    np.savez(record / "step-00000001-rank-0000.npz", token=np.array([{}], dtype=object), choice=np.zeros(1))
    with pytest.raises(ValueError, match="damaged"):  # objects would be unpickled
        Recording(record).choices(1)
