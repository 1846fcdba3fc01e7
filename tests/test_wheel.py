"""What is released is whole: an installed tedlab finds its configuration and trains, far from any checkout."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[1]
TINY = [
    *("model.layers=2", "model.hidden=16", "model.heads=2", "model.ffn=16", "model.sequence_length=8"),
    *("moe.num_experts=2", "trainer.max_steps=2", "data.batch_size=2", "data.micro_batch_size=1", "parallel=single"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source distribution, made by the environment's hatchling: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("dist")
    build = [
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "--directory",
        folder,
        "--target",
        "wheel",
        "--target",
        "sdist",
    ]
    subprocess.run(build, cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of its own with the wheel, whose dependencies are this environment's."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    site = tmp_path_factory.mktemp("wheel") / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, *built.glob("*.whl")], check=True)
    return site


def run(installed: Path, where: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_an_index_would_take_wheel_and_sdist(built: Path) -> None:
    pytest.importorskip("twine", reason="needs the extra 'dev'")
    files = sorted(built.iterdir())
    assert [file.suffix for file in files] == [".whl", ".gz"]
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_sdist_has_what_its_documents_and_tests_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "conf/train.yaml",
        "docs/tutorials/text.md",
        "tests/pool.py",
        "mkdocs.yml",
        "SECURITY.md",
        "CHANGELOG.md",
    ):
        assert needed in inside


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
