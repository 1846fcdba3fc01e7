"""The launcher: rank 0's result comes back; one failure ends all processes, is told once, and leaves nothing behind."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tedlab.checkpoint import read_meta
from tedlab.config import TrainConfig
from tedlab.errors import WorkerFailed
from tedlab.launch.launcher import _gone, _Guard, _kill_workers, launch
from tests.commands import forked
from tests.signals import answered

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


def meet_a_full_disk_while_others_communicate(config: TrainConfig) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    rank = _note(config)
    dist.init_process_group("gloo")
    if rank == 1:
        raise OSError(28, "No space left on device")
    dist.all_reduce(torch.ones(1))
    return {}


def be_killed_while_others_sleep(config: TrainConfig) -> dict[str, Any]:
    if _note(config) == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return {}


def be_killed_while_others_hear_nothing(config: TrainConfig) -> dict[str, Any]:
    """As Python does not that waits for a GPU in a library."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return be_killed_while_others_sleep(config)


def be_stopped_when_the_first_is_done(config: TrainConfig) -> dict[str, Any]:
    if _note(config) == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return {}


def fail_while_a_thread_holds_the_exit(config: TrainConfig) -> dict[str, Any]:
    if _note(config) == 1:
        threading.Thread(target=time.sleep, args=(60,)).start()
        raise ValueError("a message of rank one")
    time.sleep(60)
    return {}


def leave_while_others_sleep(config: TrainConfig) -> dict[str, Any]:
    if _note(config) == 1:
        os._exit(0)
    time.sleep(60)
    return {}


def leave_alone(config: TrainConfig) -> dict[str, Any]:
    raise SystemExit if config.seed else KeyboardInterrupt


def leave_when_the_first_is_done(config: TrainConfig) -> dict[str, Any]:
    if _note(config) == 1:
        time.sleep(1)
        os._exit(0)
    return {}


def be_killed_when_the_first_is_done(config: TrainConfig) -> dict[str, Any]:
    if _note(config) == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


def hear_ctrl_c_and_the_end_of_a_terminal(config: TrainConfig) -> dict[str, Any]:
    launcher = int(Path(config.output_dir, "launcher.pid").read_text())
    os.kill(launcher, signal.SIGHUP)
    for process in (launcher, os.getpid()):
        os.kill(process, signal.SIGINT)
    time.sleep(1)
    return {"rank": _note(config)}


def sleep_until_ended(config: TrainConfig) -> dict[str, Any]:
    _note(config)
    time.sleep(60)
    return {}


def lose_the_temporary_files(config: TrainConfig) -> dict[str, Any]:
    rank = _note(config)
    if rank == 0:
        wait_for(Path(config.output_dir, "1.pid").exists, SOON)
        shutil.rmtree(os.environ["TEDLAB_FAILURES"])
    else:
        time.sleep(2)
    return {"rank": rank}


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
        (meet_a_full_disk_while_others_communicate, ["No space left on device (process 1 of 2; its traceback: "]),
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
    log = Path(config.output_dir, "failure.log")
    assert log.exists() == ("its traceback" in message)
    assert not log.exists() or (str(log) in message and "line" not in message and "raise OSError" in log.read_text())
    shown = "".join(capfd.readouterr())
    assert "Traceback" not in shown, shown  # Hydra prints the message; nobody else may
    pids = {int(path.read_text()) for path in Path(config.output_dir).glob("*.pid")}
    assert len(pids) == 2
    assert not pids & descendants(os.getpid())


@pytest.mark.slow
def test_a_process_that_does_not_end_when_the_first_is_done_is_ended(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tedlab.launch.launcher._LEAVE_S", 1)
    with pytest.raises(WorkerFailed, match=r"process 1 of 2 failed(.|\n)*did not end within 1 s of process 0"):
        launch(be_stopped_when_the_first_is_done, config, 2)


@pytest.mark.slow
def test_processes_that_do_not_hear_are_ended_soon_after_one_was_killed(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tedlab.launch.launcher._GRACE_S", 1)
    began = time.monotonic()
    with pytest.raises(WorkerFailed, match=r"process 1 of 2 failed(.|\n)*SIGKILL"):
        launch(be_killed_while_others_hear_nothing, config, 2)
    assert time.monotonic() - began < 20  # torch's launcher insists after 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "cause"),
    [
        (fail_while_a_thread_holds_the_exit, "ValueError: a message of rank one"),
        (leave_while_others_sleep, "It was gone before its work was complete, and left no traceback."),
        (leave_when_the_first_is_done, "It was gone before its work was complete, and left no traceback."),
        (be_killed_when_the_first_is_done, "It was ended by SIGKILL"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_cause_is_told_not_what_the_launcher_did_about_it(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, run: Callable[[TrainConfig], dict[str, Any]], cause: str
) -> None:
    monkeypatch.setattr("tedlab.launch.launcher._GRACE_S", 1)
    began = time.monotonic()
    with pytest.raises(WorkerFailed) as caught:
        launch(run, config, 2)
    message = str(caught.value)
    assert message.startswith("process 1 of 2 failed; all were ended.\n\n"), message
    assert cause in message
    assert ("SIGKILL" in message) == ("SIGKILL" in cause), message
    assert time.monotonic() - began < 20


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "cause"), [(0, "KeyboardInterrupt"), (1, "SystemExit")])
def test_the_only_process_that_leaves_without_an_error_is_not_waited_for(tmp_path: Path, seed: int, cause: str) -> None:
    with pytest.raises(WorkerFailed, match=cause):
        launch(leave_alone, TrainConfig(output_dir=str(tmp_path), seed=seed), 1)


@pytest.mark.slow
def test_signals_that_the_launching_process_ignores_end_nothing(config: TrainConfig) -> None:
    """As nohup, or a script that starts it in its background, leaves them."""
    Path(config.output_dir, "launcher.pid").write_text(str(os.getpid()))
    with answered(signal.SIG_IGN, signal.SIGINT, signal.SIGHUP):
        assert launch(hear_ctrl_c_and_the_end_of_a_terminal, config, 1) == {"rank": 0}


@pytest.mark.slow
@pytest.mark.usefixtures("pool")
def test_sigterm_ends_a_run_where_a_batch_script_ignores_it(tmp_path: Path) -> None:
    """The workers hear it, too, although the server that forks them was started with it ignored."""
    code = "from tedlab.config import TrainConfig\nfrom tedlab.launch.launcher import launch\n"
    code += "from tests.launch.test_launch import sleep_until_ended\n"
    code += "if __name__ == '__main__':  # which workers import\n"
    (tmp_path / "ending.py").write_text(
        code + f"    launch(sleep_until_ended, TrainConfig(output_dir={str(tmp_path)!r}), 2)\n"
    )
    with forked("ending", [], tmp_path, os.environ, [signal.SIGTERM]) as (process, shown):
        wait_for(lambda: len([*tmp_path.glob("*.pid")]) == 2 or process.exitcode is not None, SOON)
        assert process.exitcode is None, (shown / "stderr").read_text()
        process.terminate()
        process.join(20)  # torch's launcher insists after 30
        assert process.exitcode == 128 + signal.SIGTERM, (shown / "stderr").read_text()


@pytest.mark.slow
def test_a_run_whose_temporary_files_were_cleaned_completes(config: TrainConfig) -> None:
    assert launch(lose_the_temporary_files, config, 2) == {"rank": 0}


def test_a_worker_whose_process_id_another_user_has_now_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(process: int, number: int) -> None:
        raise PermissionError

    (tmp_path / "4711_3.worker").touch()
    monkeypatch.setattr(os, "kill", refuse)
    assert _gone(tmp_path) == 3
    assert _kill_workers(tmp_path) == set()


def test_the_watch_goes_on_if_a_file_is_cleaned_while_it_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = tmp_path / "1_1.failure"
    failure.touch()
    os.utime(failure, (0, 0))
    looks = iter([[tmp_path / "0_1.failure"], [failure]])
    monkeypatch.setattr("tedlab.launch.failures.recorded", lambda folder: next(looks))
    guard = _Guard(tmp_path)
    monkeypatch.setattr(guard, "_over", SimpleNamespace(wait=lambda seconds: False))
    with subprocess.Popen(["sleep", "60"]) as worker:
        (tmp_path / f"{worker.pid}_1.worker").touch()
        try:
            guard.run()
            assert guard.ended == {worker.pid}
        finally:
            worker.kill()


# ---- a real run, interrupted ----------------------------------------------------------------------------------------


def group_members(group: int) -> list[int]:
    """Living processes of a process group."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split()[:3] for line in table.splitlines()]
    return [int(pid) for pid, pgid, state in rows if int(pgid) == group and not state.startswith("Z")]


def small(folder: Path, steps: int) -> list[str]:
    """Overrides of a run in ``folder / "run"`` with a checkpoint every five steps."""
    (folder / "corpus.txt").write_text("".join(f"line {n} of the corpus\n" for n in range(200)))
    return [
        *("data=text", "data.path=corpus.txt", f"data.cache_dir={folder}/cache", "logger=none"),
        *("model.hidden=16", "model.ffn=32", "model.sequence_length=16", "data.batch_size=4"),
        *("data.micro_batch_size=4", "data.validation_samples=4", "data.validation_fraction=0.2"),
        *("parallel=tp2", "checkpoint.every=5", f"trainer.max_steps={steps}", "hydra.run.dir=run"),
        "trainer.log_every_n_steps=1",
    ]


@pytest.mark.slow
def test_an_interrupted_run_ends_at_once_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group of a terminal; SIGTERM to the command alone is in ``test_train.py``."""
    with answered(signal.default_int_handler, signal.SIGINT):  # pytest itself may be in the background
        process = subprocess.Popen(
            [sys.executable, "-m", "tedlab.train", *small(tmp_path, 1_000_000)],
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
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=SOON)
        assert time.monotonic() - began < SOON
        assert process.returncode == 128 + signal.SIGINT, output
        wait_for(lambda: not group_members(process.pid), 2)
        assert read_meta(last)["global_step"] % 5 == 0
        assert "Traceback" not in output, output
        assert f"ckpt_path={last}" in output
        assert len(output.splitlines()) < 40, output
    finally:
        if group_members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


CRASHING = """
import os, signal
from tedlab.strategy import TEDStrategy
from tedlab.commands.train import main

original = TEDStrategy.on_train_batch_start
def crash_once(self, batch, batch_idx):
    if batch_idx == 8 and self.global_rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, batch, batch_idx)
TEDStrategy.on_train_batch_start = crash_once
main()
"""


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_go_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "crashing.py").write_text(CRASHING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*torchrun, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "crashing.py", *small(tmp_path, 12)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Restart 1 by torchrun: the run goes on from run/checkpoints/last.ckpt, step 5" in done.stdout.replace(
        f"{tmp_path}/", ""
    )
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = {int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")}
    assert losses == set(range(1, 13))  # those of before the crash, too


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
