"""Weights & Biases online: README's lines as they stand, preemption, resumption and sweeps, with a server of our own.

The commands are typed in a shell; the server is the stand-in of ``tests/wandb_server.py``, since none is here.
"""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from docs.commands import QUICK
from tests.commands import forked, run_forked
from tests.wandb_server import ENTITY, Server, wandb_server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
KEY = "0123456789" * 4
SMALL = " ".join([*QUICK, "parallel=single", "optim.warmup_steps=0", "validate_every=1000"])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with wandb_server() as server:
        yield server
    assert server.unknown == [], "requests that the stand-in cannot answer"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, server: Server) -> dict[str, str]:
    """Of a user whose W&B is the stand-in, and who has not logged in yet."""
    outside = ("WANDB_", "SLURM_", "TORCHELASTIC_", "MASTER_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    sources = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    netrc = tmp_path_factory.mktemp("home") / "netrc"
    ours = {"PATH": path, "PYTHONPATH": sources, "NETRC": str(netrc), "WANDB_BASE_URL": server.url}
    return {**environment, **ours, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def logged_in(environment: dict[str, str]) -> dict[str, str]:
    """After README's first line, in a terminal where the key is pasted."""
    line, _ = online_lines()
    process, terminal = pty.fork()
    if process == 0:
        os.execve("/bin/sh", ["sh", "-c", line], environment)
    shown, pasted, deadline = b"", False, time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if select.select([terminal], [], [], 1.0)[0]:
                shown += os.read(terminal, 4096)
        except OSError:
            break  # the terminal is closed
        if b"Paste" in shown and not pasted:
            os.write(terminal, f"{KEY}\n".encode())
            pasted = True
    _, status = os.waitpid(process, 0)
    assert status == 0, shown.decode()
    return environment


def online_lines() -> tuple[str, str]:
    """README's two lines for going online."""
    (sentence,) = re.findall(r"To go online, run (.*?) \(\[docs/wandb", (ROOT / "README.md").read_text(), re.DOTALL)
    login, train = re.findall(r"`([^`]+)`", sentence)
    return login, train


def shell(line: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["sh", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def until(true: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_readmes_two_lines_log_a_run_online(tmp_path: Path, server: Server, logged_in: dict[str, str]) -> None:
    """The configuration comes nested and before the first row; charts, tags, group, tokens and the end come, too."""
    _, train = online_lines()
    assert KEY in Path(logged_in["NETRC"]).read_text()
    before = set(server.runs)
    shell(train.replace("…", f"{SMALL} hydra.run.dir=run logger.wandb.references=true"), tmp_path, logged_in)
    ((_, run),) = [(name, run) for name, run in server.runs.items() if name not in before]
    assert run.told.index("config") < run.told.index("rows")
    assert run.config["model"]["layers"] == 2
    assert run.config["layout"]["world_size"] == 1
    assert set(run.tags) == {"model=gpt_tiny", "parallel=single", "comm=none"}
    assert re.fullmatch(r"runs/main/.*", run.group)
    steps = {row["trainer/global_step"]: row["tokens"] for row in run.rows if "train/loss" in row}
    assert steps == {step: step * 8 * 8 for step in (1, 2, 3)}
    assert {"router/load_map", "charts/memory"} <= run.config["_wandb"]["visualize"].keys()
    assert (run.exit_code, run.preempting, run.summary["state"]) == (0, False, "finished")
    last = (tmp_path / "run" / "checkpoints" / "last.ckpt").resolve()
    (references,) = [entries for entries in server.manifests if "manifest.json" in entries]
    assert references == {str(path.relative_to(last)): path.as_uri() for path in last.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("pool")
def test_a_run_that_is_preempted_says_so_and_goes_on_as_the_same_run(
    tmp_path: Path, server: Server, logged_in: dict[str, str]
) -> None:
    before = set(server.runs)
    command = [*SMALL.split(), "hydra.run.dir=run", "resume=auto", "checkpoint.every=1", "trainer.max_steps=100000"]
    # A second until rows are sent, not a quarter of a minute in which the run goes on.
    online = logged_in | {"WANDB_MODE": "online", "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}
    with forked("tedlab", ["train", *command], tmp_path, online) as (process, shown):
        until(lambda: any(len(run.rows) > 1 for name, run in server.runs.items() if name not in before))
        process.terminate()
        process.join(60)
        told = (shown / "stderr").read_text()
        assert process.exitcode == 128 + signal.SIGTERM, told
        assert "SIGTERM: all processes were ended." in told
        assert "Traceback" not in told, told
    ((name, run),) = [(name, run) for name, run in server.runs.items() if name not in before]
    assert (run.exit_code, run.preempting, run.summary["state"]) == (1, True, "interrupted")
    reached = max(row["trainer/global_step"] for row in run.rows)
    command[-1] = f"trainer.max_steps={reached + 2}"
    done = run_forked("tedlab", ["train", *command], tmp_path, online, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Going on from" in done.stdout + done.stderr
    assert set(server.runs) - before == {name}, "the same run"
    assert (run.starts, run.exit_code, run.summary["state"]) == (2, 0, "finished")
    steps = [row["trainer/global_step"] for row in run.rows if "train/loss" in row]
    assert steps[-1] == reached + 2
    assert set(steps) == set(range(1, reached + 3))


@pytest.mark.exhaustive
def test_wandbs_agent_drives_tedlab(tmp_path: Path, server: Server, logged_in: dict[str, str]) -> None:
    """``wandb sweep`` registers the example; its agent types what W&B chooses; runs know their sweep."""
    sweep = yaml.safe_load((ROOT / "examples" / "wandb_sweep.yaml").read_text())
    shown = shell(f"wandb sweep {ROOT / 'examples' / 'wandb_sweep.yaml'}", tmp_path, logged_in)
    assert yaml.safe_load(server.sweep["config"])["parameters"] == sweep["parameters"]
    (agent,) = re.findall(r"wandb agent \S+", shown)
    assert agent == f"wandb agent {ENTITY}/tedlab/abcd1234"
    small = dict(value.split("=") for value in SMALL.split())
    chosen = {"optim.lr": 0.002, "moe.top_k": 2, "moe.aux_loss": 0.01}
    arguments = {name: {"value": value} for name, value in {**small, **chosen}.items()}
    server.commands.append({"type": "run", "run_id": "chosen", "program": "tedlab", "args": arguments})
    shell(f"WANDB_MODE=online {agent}", tmp_path, logged_in)
    run = server.runs["chosen"]
    assert run.sweep == "abcd1234"
    assert (run.config["optim"]["lr"], run.config["moe"]["top_k"]) == (0.002, 2)
    assert (run.exit_code, run.preempting) == (0, False)
    assert sweep["metric"]["name"] in run.summary
