"""Every command of every tutorial works, in the order in which a reader types them, at toy size."""

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from docs.commands import QUICK, commands, run_commands
from tedlab.cli import check_overrides
from tests.commands import run_forked
from tests.exchange.families import CONFIGS, draw

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("pool")]

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
MODEL = [value for value in QUICK if value.startswith("model.")]
DATA = [value for value in QUICK if value.startswith("data.")]
ELSEWHERE = "tedlab (doctor|certify)"  # what takes long, and has tests of its own; that of a guest's model, too
TOY = {  # what makes commands small
    "train": [*MODEL, *DATA, "model.sequence_length=16", "validate_every=1000"],
    "simulate": [*MODEL, "data.batch_size=8", "data.micro_batch_size=1"],
    "plan": [*MODEL, "world_size=4", "data.batch_size=8", "plan.simulate=1"],
}


def run_tutorial(name: str, folder: Path, added: dict[str, list[str]] = TOY) -> list[str]:
    """Runs the commands of a tutorial with a hundredth of its steps, and returns what each prints."""

    def run(arguments: Sequence[str], where: Path) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "WANDB_MODE": "disabled"}
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
        done = run_forked("tedlab", arguments, where, environment, timeout=150)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"
        return done.stdout

    text = re.sub(r"max_steps=(\d+)00\b", r"max_steps=\1", (TUTORIALS / f"{name}.md").read_text())
    lines = [line for line in commands(text) if not re.match(ELSEWHERE, line)]
    assert lines
    (folder / "notes").mkdir()
    for number in range(4):
        (folder / "notes" / f"{number}.md").write_text(f"# Note {number}\n\n" + "The cat sat on the mat. " * 60)
    return run_commands(lines, folder, run, added)


def test_commands_that_run_elsewhere_are_right_as_they_stand() -> None:
    for path in TUTORIALS.glob("*.md"):
        for line in commands(path.read_text()):
            if re.match(ELSEWHERE, line):
                _, name, *overrides = shlex.split(line, comments=True)
                check_overrides(overrides, name)


def test_text(tmp_path: Path) -> None:
    *_, continued, listed = run_tutorial("text", tmp_path)
    assert "main: 10 steps" in continued
    assert listed.count("finished") == 2


def test_ablation(tmp_path: Path) -> None:
    printed = run_tutorial("ablation", tmp_path)
    assert "identical" in printed[1]
    assert "bytes sent" in printed[1]


def test_olmoe(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'hf'")
    draw(tmp_path / "olmoe", "olmoe", {**CONFIGS["olmoe"], "vocab_size": 384})
    _, verified, _, exported = run_tutorial("olmoe", tmp_path, {"train": DATA})
    assert "the same as transformers" in verified
    assert (tmp_path / "tuned" / "config.json").exists()
    assert exported.startswith("tuned: ")


def test_slurm(tmp_path: Path) -> None:
    (planned,) = run_tutorial("slurm", tmp_path)
    assert planned.splitlines()[-1].startswith("tedlab train +plan=")
    for script in re.findall(r"```sh\n(.*?)```", (TUTORIALS / "slurm.md").read_text(), re.DOTALL):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_model(tmp_path: Path) -> None:
    """The package is on the path and has the entry point that pip would write."""
    (code,) = re.findall(r"```python\n(.*?)```", (TUTORIALS / "model.md").read_text(), re.DOTALL)
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "__init__.py").write_text(code)
    (tmp_path / "my_lab-0.1.dist-info").mkdir()
    (tmp_path / "my_lab-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: my_lab\nVersion: 0.1\n")
    (tmp_path / "my_lab-0.1.dist-info" / "entry_points.txt").write_text("[tedlab]\nmy_lab = my_lab\n")
    _, simulated = run_tutorial("model", tmp_path)
    assert "equal to the closed form" in simulated
