"""Two hosts train, save and go on: torchrun finds the other by name, over IPv4 and IPv6, among several interfaces."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from docs.commands import QUICK
from tedlab.history import read_history
from tests.commands import run_forked
from tests.hosts import Host, two_hosts, why_not

ROOT = Path(__file__).parents[2]
LAYOUT = "parallel=tp2"
SMALL = [*QUICK, "logger=none", "trainer.precision=64-true", "optim.warmup_steps=0", "validate_every=1000"]
SCHEDULE = ["optim.schedule=constant", "resume=auto", "+trainer.limit_val_batches=0"]

pytestmark = [pytest.mark.exhaustive, pytest.mark.usefixtures("pool")]


@pytest.fixture
def environment() -> dict[str, str]:
    outside = ("SLURM_", "TORCHELASTIC_", "LOCAL_", "MASTER_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
    sources = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": sources}


def train(hosts: tuple[Host, Host], steps: int, environment: dict[str, str]) -> None:
    """Runs torchrun on both hosts, with a process on each."""
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=node1:29400", "--rdzv-id=one", "-m", "tedlab.train"]
    run = [LAYOUT, *SMALL, *SCHEDULE, "trainer.num_nodes=2", "trainer.devices=1", "hydra.run.dir=together"]
    command = [sys.executable, *torchrun, *run, f"trainer.max_steps={steps}"]
    started = [
        subprocess.Popen(
            host.enter(*command),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in hosts
    ]
    try:
        shown = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(shown)


def test_two_hosts_train_and_go_on_as_one_process_does(tmp_path: Path, environment: dict[str, str]) -> None:
    """Two steps by name over IPv4, and two more over IPv6 on the second of two interfaces; the losses are the same."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with two_hosts(tmp_path, {"node": ["10.77.0.{}"]}) as hosts:
        train(hosts, 2, environment)
    assert (tmp_path / "together" / "checkpoints" / "last.ckpt").exists()
    with two_hosts(tmp_path, {"node": ["fd88::{}"]}) as hosts:
        train(hosts, 4, environment | {"GLOO_SOCKET_IFNAME": "eth1"})
    alone = ["parallel=single", *SMALL, *SCHEDULE, "trainer.max_steps=4", "hydra.run.dir=alone"]
    done = run_forked("tedlab.train", alone, tmp_path, environment, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [
        [float(row["train/loss"]) for row in read_history(tmp_path / name / "metrics.csv") if "train/loss" in row]
        for name in ("together", "alone")
    ]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
