"""What SLURM would run: the tutorial's batch script, preempted and requeued, and a sweep's jobs through submitit.

There need be no SLURM. Programs named srun, sbatch and scontrol, which the tests put first on the path, start processes
with the environment that SLURM's have, and end them as SLURM 22.05 was seen to do.
"""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from docs.commands import QUICK
from tedlab.cli import CONF
from tedlab.history import read_history
from tedlab.launch import requeue
from tests.launch.test_joining import job_with_a_free_port
from tests.test_conf import compose

ROOT = Path(__file__).parents[2]
SUBMITIT = "hydra_plugins.hydra_submitit_launcher"
PRESET = CONF / "hydra" / "launcher" / "submitit_slurm.yaml"

SRUN = """#!{python}
import os, shutil, signal, subprocess, sys

command = sys.argv[1:]
while command[0].startswith("-") or shutil.which(command[0]) is None:  # options, and what they take
    del command[0]
tasks = int(os.environ["SLURM_NTASKS"])
own = {{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_NODEID": "0"}}
started = [
    subprocess.Popen(command, env=os.environ | own | {{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}})
    for n in range(tasks)
]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in started])
sys.exit(max(task.wait() if task.wait() >= 0 else 128 - task.wait() for task in started))
"""
SBATCH = """#!{python}
import os, re, subprocess, sys

script = sys.argv[-1]
tasks = re.findall(r"#SBATCH --array=0-([0-9]+)", open(script).read())
for number in range(int(tasks[0]) + 1 if tasks else 1):
    job = {{"SLURM_JOB_ID": str(7000 + number), "SLURM_ARRAY_JOB_ID": "7000", "SLURM_ARRAY_TASK_ID": str(number)}}
    job |= {{"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODELIST": "localhost"}}
    job |= {{"SLURM_JOB_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}}
    with open(f"job{{number}}.log", "w") as log:
        subprocess.Popen(["bash", script], env=os.environ | job, stdout=log, stderr=log)
print("Submitted batch job 7000")
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo "JobId=$3 JobState=${{JOB_STATE:-RUNNING}}"; else echo "$@" >> requeued; fi
"""


def slurm(folder: Path) -> dict[str, str]:
    """An environment with the programs."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("sbatch", SBATCH), ("scontrol", SCONTROL)):
        (programs / name).write_text(text.format(python=sys.executable))
        (programs / name).chmod(stat.S_IRWXU)
    outside = ("SLURM_", "TORCHELASTIC_", "LOCAL_", "MASTER_", "WANDB_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    sources = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return environment | {"PATH": path, "PYTHONPATH": sources, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_tutorials_batch_script_goes_on_where_it_was_preempted(tmp_path: Path) -> None:
    """SLURM sends SIGTERM to the tasks, and starts the script again under the same number.

    Where it gives them time to end, the job has failed if the script then ends, unless it has asked to be queued again.
    """
    tutorial = (ROOT / "docs" / "tutorials" / "slurm.md").read_text()
    (script,) = re.findall(r"```sh\n(#!/usr/bin/env bash\n.*?)```", tutorial, re.DOTALL)
    assert "#SBATCH --requeue" in script
    small = script.replace("trainer=gpu", "trainer=cpu").replace("resume=auto", "resume=auto $SMALL")
    (tmp_path / "job.sbatch").write_text(small)
    (tmp_path / "plan.overrides").write_text("parallel=tp2\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "corpus").mkdir()
    text = "".join(json.dumps({"text": "The cat sat on the mat. " * 20}) + "\n" for _ in range(40))
    (tmp_path / "corpus" / "one.jsonl").write_text(text)
    job = str(job_with_a_free_port())
    environment = slurm(tmp_path) | {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NAME": "olmoe",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODELIST": "localhost",
    }
    run = tmp_path / "runs" / f"olmoe-{job}"

    def start(steps: int) -> "subprocess.Popen[str]":
        every = ["optim.warmup_steps=0", "validate_every=1000000", "checkpoint.every=2", f"trainer.max_steps={steps}"]
        return subprocess.Popen(
            ["bash", "job.sbatch"],
            cwd=tmp_path,
            env=environment | {"SMALL": " ".join([*QUICK, *every])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    first = start(100_000)
    try:
        deadline = time.monotonic() + 150
        while not (run / "checkpoints" / "last.ckpt").exists():
            assert first.poll() is None, first.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        steps = subprocess.run(["ps", "-o", "pid=", "--ppid", str(first.pid)], capture_output=True, text=True).stdout
        os.kill(int(steps), signal.SIGTERM)  # that is srun's; SLURM leaves the script alone
        shown, _ = first.communicate(timeout=60)
        assert "Traceback" not in shown
        assert (tmp_path / "requeued").read_text() == f"requeue {job}\n"
        assert first.returncode == 128 + signal.SIGTERM
    finally:
        first.kill()
    assert json.loads((run / "summary.json").read_text())["state"] == "interrupted"
    reached = max(int(row["step"]) for row in read_history(run / "metrics.csv"))
    again = start(reached + 2)
    shown, _ = again.communicate(timeout=200)
    assert again.returncode == 0, shown
    assert (tmp_path / "requeued").read_text().count("\n") == 1
    assert "Going on from" in shown
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    steps = [int(row["step"]) for row in read_history(run / "metrics.csv") if "train/loss" in row]
    assert steps == [*range(1, reached + 3)]


@pytest.mark.parametrize(
    ("executor", "state", "queued"),
    [("slurm", "RUNNING", True), ("slurm", "CANCELLED", False), ("local", "RUNNING", False), (None, "RUNNING", False)],
)
def test_a_job_of_submitits_that_is_preempted_is_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str | None, state: str, queued: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    environment = {"PATH": slurm(tmp_path)["PATH"], "JOB_STATE": state, "SLURM_JOB_ID": "12"}
    for name, value in (environment | ({} if executor is None else {"SUBMITIT_EXECUTOR": executor})).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(requeue, "_ENDED_S", 0)
    requeue.queue_again()
    assert (tmp_path / "requeued").exists() == queued
    if queued:
        assert (tmp_path / "requeued").read_text() == "requeue 12\n"


def test_a_node_without_scontrol_ends_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"PATH": str(tmp_path), "SLURM_JOB_ID": "12", "SUBMITIT_EXECUTOR": "slurm"}.items():
        monkeypatch.setenv(name, value)
    requeue.queue_again()
    assert "there is no scontrol here" in capsys.readouterr().err


def test_the_preset_has_no_name_that_the_launcher_lacks() -> None:
    """Every one can be set by name: the file has all that people set."""
    compose("hydra/launcher=submitit_slurm")
    HydraConfig.instance().cfg = None
    given = OmegaConf.load(PRESET)
    assert {"partition", "account", "gpus_per_node", "timeout_min", "setup"} <= given.keys()
    if find_spec("hydra_plugins") is None or find_spec(SUBMITIT) is None:
        return
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    assert given.keys() <= {field.name for field in fields(SlurmQueueConf)}
    assert given._target_ == SlurmQueueConf._target_


@pytest.mark.exhaustive
def test_a_sweep_is_submitted_and_its_jobs_train(tmp_path: Path) -> None:
    if find_spec("hydra_plugins") is None or find_spec(SUBMITIT) is None:
        pytest.skip("needs tedlab[slurm]")
    environment = slurm(tmp_path)
    small = [*QUICK, "optim.warmup_steps=0", "validate_every=1000", "hydra.sweep.dir=sweep"]
    done = subprocess.run(
        [sys.executable, "-m", "tedlab", "train", "-m", "hydra/launcher=submitit_slurm", "parallel=single,tp2", *small],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summaries = [json.loads((tmp_path / "sweep" / job / "summary.json").read_text()) for job in "01"]
    assert [summary["layout"]["world_size"] for summary in summaries] == [1, 2]
    assert summaries[0]["train/loss"] == pytest.approx(summaries[1]["train/loss"], rel=1e-4)
