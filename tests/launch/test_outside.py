"""Processes that torchrun or srun has started are used; what only looks like one of them is refused at once."""

import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from tedlab import TEDStrategy
from tedlab.commands.train import after_restart
from tedlab.config import TrainConfig
from tedlab.errors import WrongEnvironment
from tedlab.launch.launcher import launch
from tedlab.launch.outside import check, started_outside

TORCHRUN = {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.fixture(autouse=True)
def _no_outside_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in TORCHRUN:
            monkeypatch.delenv(name)


def put(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def _here(config: TrainConfig) -> dict[str, Any]:
    return {"pid": os.getpid(), "seed": config.seed}


LIGHTNINGS_OWN = {**TORCHRUN, "NODE_RANK": "0"}
del LIGHTNINGS_OWN["RANK"]


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN, LIGHTNINGS_OWN], ids=["torchrun", "srun", "lightning"])
def test_processes_that_exist_already_are_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str]
) -> None:
    put(monkeypatch, environment)
    config = TrainConfig(output_dir=str(tmp_path), seed=7)
    assert launch(_here, config, 4) == {"pid": os.getpid(), "seed": 7}


@pytest.mark.parametrize("environment", [{}, {"SLURM_NTASKS": "1"}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": ""}])
def test_alone_a_process_starts_its_own(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    put(monkeypatch, environment)
    check(4)
    assert not started_outside()


BATCH = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "job.sh"}
WRONG = {
    "local_rank_alone": ({"LOCAL_RANK": "0"}, ["LOCAL_RANK=0", "RANK, WORLD_SIZE, MASTER_ADDR", "unset LOCAL_RANK"]),
    "no_address": ({**TORCHRUN, "MASTER_ADDR": ""}, ["but MASTER_ADDR is not", "torchrun"]),
    "no_rank": ({**LIGHTNINGS_OWN, "NODE_RANK": ""}, ["but RANK is not"]),
    "batch_script": (BATCH, ["SLURM_NTASKS is 4", "SLURM_STEP_ID is not set", "job.sh", "srun python"]),
    "allocation_from_a_login_node": ({"SLURM_NTASKS": "4"}, ["SLURM_NTASKS is 4", "unset SLURM_NTASKS"]),
    "interactive_step": ({**SRUN, "SLURM_STEP_ID": "4294967290"}, ["the allocation's own shell", "srun python"]),
    "one_task_of_an_allocation": ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, ["SLURM_STEP_NUM_TASKS is 1"]),
    "other_number": ({**TORCHRUN, "WORLD_SIZE": "3"}, ["WORLD_SIZE is 3", "parallel.world_size is 2"]),
    "other_number_of_tasks": (SRUN, ["SLURM_NTASKS is 4", "parallel.world_size is 2"]),
}


@pytest.mark.parametrize(("environment", "fragments"), WRONG.values(), ids=WRONG)
def test_what_only_looks_like_one_of_several_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], fragments: list[str]
) -> None:
    put(monkeypatch, environment)
    with pytest.raises(WrongEnvironment) as caught:
        check(2)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == [], str(caught.value)


def test_a_guests_trainer_is_refused_too_instead_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning takes SLURM_NTASKS or LOCAL_RANK alone for processes that exist, and would wait for them."""
    for environment in ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}, {"LOCAL_RANK": "0"}):
        with monkeypatch.context() as patch:
            put(patch, environment)
            with pytest.raises(WrongEnvironment, match=next(iter(environment))):
                Trainer(accelerator="cpu", devices=2, strategy=TEDStrategy(2))


def test_a_restarted_group_goes_on_from_its_last_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tedlab.checkpoint.read_meta", lambda path: {"global_step": 40})
    put(monkeypatch, {**TORCHRUN, "RANK": "0", "TORCHELASTIC_RESTART_COUNT": "2"})
    config = TrainConfig(output_dir=str(tmp_path), ckpt_path="elsewhere.ckpt")
    assert after_restart(config).ckpt_path == "elsewhere.ckpt"
    assert "Restart 2 by torchrun: the run goes on from the beginning" in capsys.readouterr().out
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.mkdir(parents=True)
    assert after_restart(config).ckpt_path == str(last)
    assert f"from {last}, step 40" in capsys.readouterr().out
