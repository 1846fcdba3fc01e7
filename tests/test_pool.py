"""The pool tells what went wrong, and where; a world is run again for nothing but a rank's sudden end."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import deaths
from tests.pool import WorkerPool


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where this file's deaths are counted, which are not those of the run."""
    file = tmp_path / "deaths"
    file.touch()
    monkeypatch.setenv(deaths.FILE, str(file))
    return file


def fall(mark: Path, falls: int) -> int:
    """Rank 1 aborts in its first ``falls`` worlds, as C++ code does; its peer waits for it in a collective."""
    if dist.get_rank() == 1:
        with mark.open("a") as file:
            file.write("x")
        if mark.stat().st_size <= falls:
            os.kill(os.getpid(), signal.SIGABRT)
    dist.all_reduce(torch.ones(1))
    return dist.get_rank()


def be_wrong(mark: Path) -> None:
    mark.touch(exist_ok=False)  # a second run would complain of that
    raise ValueError("this rank is wrong")


def hang(mark: Path) -> None:
    if dist.get_rank() == 0:
        mark.touch(exist_ok=False)
    time.sleep(30)


def test_a_world_in_which_a_rank_fell_is_run_once_more_with_a_warning(
    pool: WorkerPool, tmp_path: Path, counted: Path
) -> None:
    with pytest.warns(
        UserWarning, match=r"rank 1 of 2 failed:\nended by SIGABRT(.|\n)*test_pool.py\", line \d+ in fall"
    ):
        assert pool.run(2, fall, tmp_path / "mark", 1) == [0, 1]
    assert counted.read_text() == "rank 1 of 2 in fall: ended by SIGABRT\n"


def test_a_rank_that_falls_again_fails_and_is_the_one_to_blame(pool: WorkerPool, tmp_path: Path, counted: Path) -> None:
    with (
        pytest.warns(UserWarning, match="A world is run once more"),
        pytest.raises(AssertionError, match=r"rank 1 of 2 failed:\nended by SIGABRT"),
    ):
        pool.run(2, fall, tmp_path / "mark", 2)
    assert len(counted.read_text().splitlines()) == 2


@pytest.mark.parametrize(("fallen", "passes"), [(1, True), pytest.param(2, False, marks=pytest.mark.slow)])
def test_a_pytest_run_with_more_than_one_death_over_all_its_processes_fails(
    tmp_path: Path, fallen: int, passes: bool
) -> None:
    (tmp_path / "conftest.py").write_text("from tests.deaths import *\n")
    for number in range(2):
        name, death = f"test_{number}.py", f'    deaths.record("rank {number} fell")\n' if number < fallen else ""
        (tmp_path / name).write_text(f"from tests import deaths\ndef test_passes():\n{death}    assert True\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "xdist",
            "-n",
            "2",
            "--dist",
            "loadfile",
            "-c",
            os.devnull,
            "-q",
            str(tmp_path),
        ],
        env=os.environ
        | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert (done.returncode == 0) is passes, done.stdout
    assert f"ranks that a signal ended: {fallen}" in done.stdout


def test_what_is_wrong_or_hangs_has_no_second_chance(pool: WorkerPool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AssertionError, match=r"rank 0 of 1 failed:(.|\n)*ValueError: this rank is wrong"):
            pool.run(1, be_wrong, tmp_path / "wrong")
        with pytest.raises(AssertionError, match=r"rank 0 of 2: no answer in time; it was at\n(.|\n)* in hang\n"):
            pool.run(2, hang, tmp_path / "hung", timeout=3)
