"""Errors that users understand are shown as a sentence, with the traceback in a file; others with their traceback."""

import errno
import multiprocessing
import os
from pathlib import Path

import pytest
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from tedlab.errors import DirectoryInUse, UsageError
from tedlab.launch import failures
from tedlab.launch.launcher import LOG, _end_with, _kept
from tedlab.launch.sweep import SweepFailures

FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x")
TOLD = {
    "ours": (UsageError("it cannot be so"), "it cannot be so"),
    "in_use": (DirectoryInUse("another run"), "another run"),
    "disk": (FULL_DISK, "[Errno 28] No space left on device: 'runs/x'"),
    "wandb": (wandb.errors.UsageError("no key"), "W&B: no key"),
    "its_server": (wandb.errors.CommError("not found"), "W&B: not found"),
}


def recorded(error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str | None]:
    """What a worker that an error ends leaves to its launcher."""
    monkeypatch.setenv("TEDLAB_FAILURES", str(folder))
    monkeypatch.setenv("RANK", "3")
    try:
        raise error
    except BaseException as raised:
        failures.record_error(raised)
    (file,) = failures.recorded(folder)
    assert failures.rank_of(file) == 3
    return file.read_text(), failures.trace_of(file)


@pytest.mark.parametrize(("error", "said"), TOLD.values(), ids=TOLD)
def test_what_users_understand_is_a_sentence_beside_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    shown, trace = recorded(error, tmp_path, monkeypatch)
    assert shown == said
    assert trace is not None
    assert trace.startswith("Traceback")
    assert "raise error" in trace


def test_mistakes_in_code_are_shown_with_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    shown, trace = recorded(ValueError("shapes differ"), tmp_path, monkeypatch)
    assert shown.startswith("Traceback")
    assert shown.rstrip().endswith("ValueError: shapes differ")
    assert trace is None


def test_everything_is_shown_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    shown, trace = recorded(FULL_DISK, tmp_path, monkeypatch)
    assert shown.startswith("Traceback")
    assert trace is None


def test_a_traceback_is_kept_where_the_run_is_if_it_can_be(tmp_path: Path) -> None:
    assert _kept("Traceback …", tmp_path / "run") == f"its traceback: {tmp_path / 'run' / LOG}"
    assert (tmp_path / "run" / LOG).read_text() == "Traceback …"
    (tmp_path / "file").touch()
    assert _kept("Traceback …", tmp_path / "file") == "HYDRA_FULL_ERROR=1 shows its traceback"


def test_a_command_in_one_process_ends_with_the_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create({"mode": RunMode.RUN}))
    with pytest.raises(SystemExit) as ended, SweepFailures().told():
        raise FULL_DISK
    assert ended.value.code == 1
    shown = capsys.readouterr().err
    assert shown == "[Errno 28] No space left on device: 'runs/x' (HYDRA_FULL_ERROR=1 shows its traceback)\n"
    with pytest.raises(KeyError), SweepFailures().told():
        raise KeyError("a mistake in code")
    monkeypatch.setenv("LOCAL_RANK", "0")  # as of torchrun
    with pytest.raises(OSError, match="No space left"), SweepFailures().told():
        raise FULL_DISK
    with pytest.raises(SystemExit), SweepFailures().told():
        raise UsageError("a sentence of our own")


@pytest.mark.parametrize("pipe_tells", [True, False])
def test_workers_end_with_their_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe_tells: bool) -> None:
    """At once by the pipe to it; if something else holds that, as soon as there is no process of its id."""
    launcher, peer = 4_000_001, 4_000_002
    living, killed = {launcher, peer, os.getpid()}, []

    class Parent:
        looks = 0

        def is_alive(self) -> bool:
            return self.looks == 0 or not pipe_tells

        def join(self, timeout: float) -> None:
            self.looks += 1
            assert self.looks == 1
            if not pipe_tells:  # otherwise its id stays, as that of a process that nobody has waited for
                living.discard(launcher)

    def kill(process: int, number: int) -> None:
        if process not in living:
            raise ProcessLookupError
        if number:
            killed.append(process)

    monkeypatch.setattr(multiprocessing, "parent_process", Parent)
    monkeypatch.setattr(os, "kill", kill)
    for rank, worker in enumerate((os.getpid(), peer)):
        (tmp_path / f"{worker}_{rank}.worker").touch()
    _end_with(launcher, tmp_path)
    assert killed == [peer, os.getpid(), os.getpid()], "its peers first, which may be stopped"
