"""The launcher: rank 0's result comes back; one failure ends all processes, is told once, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tedlab.checkpoint import read_meta
from tedlab.config import TrainConfig
from tedlab.launch import WorkerFailed, launch, started_outside

SOON = 30  # seconds in which everything has to be over


@pytest.fixture(autouse=True)
def _no_outside_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))] + ["LOCAL_RANK"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(output_dir=str(tmp_path), seed=7)


def descendants(pid: int) -> set[int]:
    """Living processes below ``pid``, itself excluded."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split()[:3] for line in table.splitlines()]
    found: set[int] = {pid}
    while new := {int(p) for p, parent, state in rows if int(parent) in found and not state.startswith("Z")} - found:
        found |= new
    return found - {pid}


# ---- what the workers run; each writes its process id ---------------------------------------------------------------


def _note(config: TrainConfig) -> int:
    rank = int(os.environ["RANK"])
    Path(config.output_dir, f"{rank}.pid").write_text(str(os.getpid()))
    return rank


def sum_over_ranks(config: TrainConfig) -> dict[str, Any]:
    """Uses the process group that the environment describes."""
    import torch
    import torch.distributed as dist

    rank = _note(config)
    dist.init_process_group("gloo")
    total = torch.tensor(rank + config.seed)
    dist.all_reduce(total)
    dist.destroy_process_group()
    return {"rank": rank, "total": int(total), "threads": torch.get_num_threads(), "pid": os.getpid()}


def fail_while_others_sleep(config: TrainConfig) -> dict[str, Any]:
    if _note(config) == 1:
        time.sleep(1)
        raise ValueError("a message of rank one")
    time.sleep(60)
    return {}


def fail_while_others_communicate(config: TrainConfig) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    rank = _note(config)
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        raise ValueError("a message of rank one")
    dist.all_reduce(torch.ones(1))
    return {}


def be_killed_while_others_sleep(config: TrainConfig) -> dict[str, Any]:
    if _note(config) == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return {}


# ---- claims ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_process_runs_the_function_and_the_first_ones_result_comes_back(config: TrainConfig) -> None:
    environment = dict(os.environ)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    result = launch(sum_over_ranks, config, 3)
    assert (result["rank"], result["total"]) == (0, 0 + 1 + 2 + 3 * 7)
    assert result["pid"] != os.getpid()
    assert len({path.read_text() for path in Path(config.output_dir).glob("*.pid")}) == 3
    changed = {name for name in {*environment, *os.environ} if os.environ.get(name) != environment.get(name)}
    assert changed <= {"TORCHELASTIC_SIGNALS_TO_HANDLE"}
    # Otherwise Ctrl-C between two jobs of a sweep would be a SignalException, which Hydra takes for a failed job.
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "fragments"),
    [
        (fail_while_others_sleep, ["process 1 of 2", "ValueError: a message of rank one"]),
        (fail_while_others_communicate, ["ValueError: a message of rank one"]),
        (be_killed_while_others_sleep, ["process 1 of 2", "SIGKILL"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_failure_ends_all_processes_and_is_told_once(
    config: TrainConfig,
    capfd: pytest.CaptureFixture[str],
    run: Callable[[TrainConfig], dict[str, Any]],
    fragments: list[str],
) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerFailed) as caught:
        launch(run, config, 2)
    assert time.monotonic() - began < SOON
    message = str(caught.value)
    for fragment in fragments:
        assert message.count(fragment) == 1, message
    assert message.count("Traceback (most recent call last)") <= 1
    shown = "".join(capfd.readouterr())
    assert "Traceback" not in shown, shown  # Hydra prints the message; nobody else may
    pids = {int(path.read_text()) for path in Path(config.output_dir).glob("*.pid")}
    assert len(pids) == 2
    assert not pids & descendants(os.getpid())


def _here(config: TrainConfig) -> dict[str, Any]:
    return {"pid": os.getpid(), "seed": config.seed}


@pytest.mark.parametrize(
    ("environment", "outside"),
    [
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, True),
        ({"SLURM_NTASKS": "4"}, True),
        ({"SLURM_NTASKS": "1"}, False),
        ({}, False),
    ],
)
def test_processes_that_exist_already_are_used(
    monkeypatch: pytest.MonkeyPatch, config: TrainConfig, environment: dict[str, str], outside: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert started_outside() is outside
    if outside:
        assert launch(_here, config, 4) == {"pid": os.getpid(), "seed": 7}


# ---- a real run, interrupted ----------------------------------------------------------------------------------------


def group_members(group: int) -> list[int]:
    """Living processes of a process group."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split()[:3] for line in table.splitlines()]
    return [int(pid) for pid, pgid, state in rows if int(pgid) == group and not state.startswith("Z")]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_an_interrupted_run_ends_at_once_and_leaves_a_checkpoint(
    tmp_path: Path, number: signal.Signals, to_group: bool
) -> None:
    """Ctrl-C reaches the whole group of a terminal, a scheduler's SIGTERM the command alone."""
    (tmp_path / "corpus.txt").write_text("".join(f"line {n} of the corpus\n" for n in range(200)))
    arguments = [
        *("data=text", "data.path=corpus.txt", f"data.cache_dir={tmp_path}/cache", "logger=none"),
        *("model.hidden=16", "model.ffn=32", "model.sequence_length=16", "data.batch_size=4"),
        *("data.micro_batch_size=4", "data.validation_samples=4", "data.validation_fraction=0.2"),
        *("parallel=tp2", "checkpoint.every=5", "trainer.max_steps=1000000", "hydra.run.dir=run"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "tedlab.train", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    try:
        wait_for(lambda: last.exists() or process.poll() is not None, 90)
        assert process.poll() is None, process.communicate()[0]
        time.sleep(1)
        began = time.monotonic()
        (os.killpg if to_group else os.kill)(process.pid, number)
        output, _ = process.communicate(timeout=SOON)
        assert time.monotonic() - began < SOON
        assert process.returncode == 128 + number, output
        wait_for(lambda: not group_members(process.pid), 2)
        assert read_meta(last)["global_step"] % 5 == 0
        assert "Traceback" not in output, output
        assert f"ckpt_path={last}" in output
        assert len(output.splitlines()) < 40, output
    finally:
        if group_members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
