"""Parts that other packages add: by name, by class, and with a configuration of their own."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import LambdaCallback

from tedlab.certify import certify
from tedlab.certify.certificate import Recorded
from tedlab.cli import UsageError, check_overrides
from tedlab.config import TrainConfig
from tedlab.models import models
from tedlab.moe import Router, mixtures, routers
from tedlab.optim import learning_rate_schedule, schedules
from tedlab.registry import Registry
from tedlab.run import build
from tedlab.validate import complete
from tests.certify.runs import composed
from tests.commands import run_forked
from tests.pool import WorkerPool
from tests.predict.sim.test_simulation import checked, simulated

EXAMPLE = Path(__file__).parents[1] / "examples" / "guest_package"
CONF = EXAMPLE / "guest_package" / "conf"


# ---- names -------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_all_that_there_are() -> None:
    registry: Registry[int] = Registry("moe.gating")
    registry.register("one")(1)
    registry.register("two")(2)
    assert registry["two"] == 2
    with pytest.raises(ValueError, match=r"moe\.gating=three is unknown; valid: one, two"):
        registry["three"]


def test_a_name_stands_for_one_part() -> None:
    with pytest.raises(ValueError, match=r"moe\.gating=default is taken"):
        routers.register("default")(type("Another", (Router,), {}))
    with pytest.raises(ValueError, match=r"optim\.schedule=triangle is unknown; valid: cosine, constant, wsd"):
        learning_rate_schedule("triangle", 0, 10, 0.1)


# ---- configuration files -----------------------------------------------------------------------------------------


def test_options_in_a_folder_of_ones_own_are_known() -> None:
    check_overrides([f"hydra.searchpath=[file://{CONF}]", "experiment=guest", "callbacks.bytes=null"])
    with pytest.raises(UsageError, match="there is no option 'guest'"):
        check_overrides(["experiment=guest"])
    with pytest.raises(UsageError, match=r"there is no option 'quest'\. Did you mean 'guest'"):
        check_overrides([f"hydra.searchpath=[file://{CONF}]", "experiment=quest"])


# ---- token paths -------------------------------------------------------------------------------------------------


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's parts are registered in this process, as long as a test runs."""
    for registry in (mixtures, models, routers, schedules):
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for module in ("callback", "data", "hook", "logger", "model", "optimizer", "router", "schedule", "token_path"):
        monkeypatch.delitem(sys.modules, f"guest_package.{module}", raising=False)
    monkeypatch.delitem(sys.modules, "guest_package", raising=False)
    import_module("guest_package")


def with_guests(run: Recorded, config: TrainConfig) -> None:
    sys.path.insert(0, str(EXAMPLE))
    import_module("guest_package")
    run(config)


def unpredicted(config: TrainConfig) -> list[dict[Any, Any]]:
    """Differences between what a simulated rank communicates and the closed form, of the first rank and the last."""
    found: list[dict[Any, Any]] = []
    with_guests(lambda config: found.extend(rank.differences for rank in simulated(config, 0, 7)), config)  # type: ignore
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("guests")
def test_a_path_for_rows_of_another_package_equals_one_process_and_is_predicted(pool: WorkerPool) -> None:
    def execute(run: Recorded, config: TrainConfig) -> None:
        pool.run(config.parallel.world_size, with_guests, run, config)

    toggles = [
        "moe.dispatch=guest_plain_rows",
        "comm=dtd",
        "model.recompute.granularity=block",
        "comm.cac=true",
        "moe.top_k=2",
    ]
    found = certify(composed("parallel=tp2_ep2", *toggles), execute, continuations=[])
    assert found.ok, str(found.culprit)
    larger = ["data.micro_batch_size=2", "parallel.world_size=8", "parallel.tensor=2", "parallel.expert=2"]
    assert pool.run(1, unpredicted, checked(*larger, *toggles))[0] == [{}, {}]
    for path in ("guest_plain", "guest_plain_rows"):
        with pytest.raises(UsageError, match=rf"moe.dispatch={path} needs parallel.sequence=false"):
            checked("parallel=tp2_ep2", f"moe.dispatch={path}", "parallel.sequence=true")


# ---- data --------------------------------------------------------------------------------------------------------


def batches_read(config: TrainConfig) -> list[list[int]]:
    """The first tokens of the samples that this process reads in each step; the end is saved."""
    steps: list[list[int]] = []
    see = LambdaCallback(on_train_batch_start=lambda _, __, batch, ___: steps.append(batch[:, 0].tolist()))

    def train(config: TrainConfig) -> None:
        trainer, module, data = build(config, [see], logged=False)
        trainer.fit(module, data, ckpt_path=config.ckpt_path)
        trainer.save_checkpoint(f"{config.output_dir}/end")

    with_guests(train, config)
    return steps


@pytest.mark.usefixtures("guests")
def test_data_of_another_package_is_read_on_where_a_checkpoint_ends(pool: WorkerPool, tmp_path: Path) -> None:
    tiny = ["parallel=dp2", "model.layers=2", "model.hidden=8", "model.heads=2", "model.ffn=8", "moe=dense"]
    tiny += ["data.module=guest_package.data.Counting", "model.sequence_length=4", "checkpoint.every=null"]
    tiny += [
        "data.batch_size=8",
        "data.micro_batch_size=4",
        "optim.warmup_steps=0",
        "+trainer.enable_progress_bar=false",
    ]

    def read(steps: int, directory: Path, ckpt_path: Path | None = None) -> list[list[list[int]]]:
        config = complete(composed(*tiny, f"trainer.max_steps={steps}"))
        path = None if ckpt_path is None else str(ckpt_path)
        return pool.run(2, batches_read, replace(config, output_dir=str(directory), ckpt_path=path))

    whole = read(4, tmp_path / "whole")
    half = read(2, tmp_path / "half")
    rest = read(4, tmp_path / "rest", tmp_path / "half" / "end")
    assert [first + second for first, second in zip(half, rest, strict=True)] == whole
    assert len({tuple(batch) for rank in whole for batch in rank}) == 8  # no batch is read twice


# ---- a whole package ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and the example package installed in a folder below it, as a wheel would be."""
    folder = tmp_path_factory.mktemp("guests")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(folder / "site"), str(EXAMPLE)], check=True, timeout=120)
    (folder / "corpus").mkdir()
    for number in range(12):
        (folder / "corpus" / f"{number}.txt").write_text(f"{number} alpha beta gamma delta print range\n" * 20)
    return folder


SMALL = ["data=text", "data.path=corpus", "data.cache_dir=cache", "data.batch_size=8", "data.micro_batch_size=2"]
SMALL += ["data.validation_samples=8", "data.validation_fraction=0.2", "model.layers=2", "model.hidden=32"]
SMALL += ["model.ffn=64", "model.sequence_length=16", "optim.warmup_steps=1", "trainer.max_steps=3", "comm=dtd"]
GUEST = ["hydra.searchpath=[pkg://guest_package.conf]", "experiment=guest"]


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join((str(folder / "site"), os.environ.get("PYTHONPATH", "")))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


@pytest.mark.slow
@pytest.mark.usefixtures("pool")
def test_a_run_is_made_of_the_parts_of_another_package(installed: Path) -> None:
    command = ["train", *SMALL, *GUEST, "hydra.run.dir=run", "trainer.log_every_n_steps=1"]
    done = run_forked("tedlab", command, installed, environment(installed), timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    run = installed / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["comm/predicted_difference_calls"] == summary["comm/predicted_difference_bytes"] == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Of the step that follows: the bottom of the triangle, its top, its bottom.
    rates = {line["step"]: line["train/learning_rate"] for line in lines if "train/learning_rate" in line}
    assert [rates[step] for step in sorted(rates)] == pytest.approx([1e-4, 1e-3, 1e-4], rel=1e-6)
    spread = json.loads((run / "loss_spread.json").read_text())
    assert spread["micro_batches"] == 6
    assert 0 < spread["lowest"] < spread["highest"] < 10
    assert json.loads((run / "bytes_by_group.json").read_text())["expert"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("command", [["certify"], ["simulate", "cluster=two_desks"]], ids=lambda command: command[0])
def test_it_is_certified_and_simulated_like_any_other(installed: Path, command: list[str]) -> None:
    """It ends with 1 if the layout computes anything else than one process, or ledger and closed form differ."""
    done = run_forked("tedlab", [*command, *SMALL, *GUEST], installed, environment(installed), timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
