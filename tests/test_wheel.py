"""What pip installs is whole: an installed tedlab finds its configuration and trains, far from any checkout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[1]
TINY = [
    *("model.layers=2", "model.hidden=16", "model.heads=2", "model.ffn=16", "model.sequence_length=8"),
    *("moe.num_experts=2", "trainer.max_steps=2", "data.batch_size=2", "data.micro_batch_size=1"),
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of its own with the wheel, whose dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # The environment's hatchling (of the dev extra): nothing is downloaded.
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, CHECKOUT], check=True)
    (wheel,) = folder.glob("tedlab-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def run(installed: Path, where: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_installed_package_is_not_the_checkout(installed: Path, tmp_path: Path) -> None:
    said = run(installed, tmp_path, "-c", "import tedlab.cli as c; print(c.__file__, c.CONF)")
    assert [str(installed) in path for path in said.split()] == [True, True]


def test_it_composes_what_the_checkout_composes(installed: Path, tmp_path: Path) -> None:
    theirs = run(installed, tmp_path, "-m", "tedlab.train", "--cfg", "job", "experiment=layouts")
    ours = run(CHECKOUT / "src", tmp_path, "-m", "tedlab.train", "--cfg", "job", "experiment=layouts")
    assert OmegaConf.create(theirs) == OmegaConf.create(ours)


def test_it_trains(installed: Path, tmp_path: Path) -> None:
    run(installed, tmp_path, "-m", "tedlab.train", *TINY)
    (summary,) = tmp_path.glob("runs/*/*/summary.json")
    assert json.loads(summary.read_text())["steps"] == 2
