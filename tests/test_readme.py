"""The code of documents runs as it stands there, what they name exists, and the README stays short."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig

from docs.commands import QUICK, commands
from tedlab.__main__ import COMMANDS
from tedlab.cli import check_overrides, with_sources
from tedlab.config import value_of
from tedlab.validate import complete_simulated
from tests.test_conf import compose

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("[!.]*/**/README.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_pictures_modules_and_commands_exist(document: Path) -> None:
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    modules = set(re.findall(r"python -m ((?:tedlab|experiments|benchmarks|tests)[\w.]*)", text))
    missing = [link for link in links if not (document.parent / link).exists()]
    code = [*re.findall(r"```bash\n(.*?)```", text, re.DOTALL), *re.findall(r"`(tedlab [^`\n]+)`", text)]
    commands = re.findall(r"(?:^|&& )tedlab (\w+)", "\n".join(code), re.MULTILINE)
    missing += [command for command in commands if command not in COMMANDS]
    missing += [module for module in modules if importlib.util.find_spec(module) is None]
    assert not missing


def test_the_readme_is_read_in_minutes() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_every_dependency_has_a_licence_in_the_list() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = (ROOT / "docs" / "dependencies.md").read_text()
    needed = project["dependencies"] + [text for extra in project["optional-dependencies"].values() for text in extra]
    names = {re.match(r"[\w-]+", text)[0] for text in needed} - {"tedlab"}
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", listed)) == []


COMMANDED = [README, *sorted(ROOT.glob("docs/*.md")), *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(
            path, id=path.stem, marks=() if path == README or path.parent.name == "tutorials" else pytest.mark.slow
        )
        for path in COMMANDED
        if re.search(r"^tedlab train", path.read_text(), re.MULTILINE)
    ],
)
def test_every_training_command_of_a_document_is_a_valid_configuration(document: Path) -> None:
    """Composed and checked as before a run; what a command reads, and parts that the document has just added, aside."""
    for line in commands(document.read_text()):
        program, *arguments = shlex.split(line, comments=True)
        if program == "torchrun" and "tedlab.train" in arguments:
            program, arguments = "tedlab", ["train", *arguments[arguments.index("tedlab.train") + 1 :]]
        if program != "tedlab" or arguments[0] != "train" or any(word.startswith("+plan=") for word in arguments):
            continue
        overrides = with_sources([word for word in arguments[1:] if word != "-m" and not word.startswith(_READ)])
        check_overrides(overrides)
        config = compose(
            *(word.split(",")[0] if re.fullmatch(r"[\w.]+=[\w.]+(,[\w.]+)+", word) else word for word in overrides)
        )
        HydraConfig.instance().cfg = None
        complete_simulated(config)


_READ = ("ckpt_path=", "weights=", "model.architecture=my_", "routing.replay=")


@pytest.mark.slow
def test_the_strategy_works_alone_in_a_plain_script(tmp_path: Path) -> None:
    """No Hydra, no launcher of ours: Lightning starts the other processes itself."""
    document = ROOT / "docs" / "strategy.md"
    (code,) = re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL)
    (tmp_path / "script.py").write_text(code)
    result = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "`Trainer.fit` stopped: `max_steps=8` reached." in result.stderr
    assert list(tmp_path.rglob("*.ckpt/.metadata")), "Lightning's default checkpoint is one of our directories"


@pytest.mark.exhaustive  # CI composes it, and has a shorter run of torchrun's in launch/test_launch.py
def test_the_readmes_torchrun_line_trains_as_it_stands(tmp_path: Path) -> None:
    """As long as it takes to see four processes at work: a small model, three steps."""
    (line,) = re.findall(r"^torchrun .*?(?= +#|$)", README.read_text(), re.MULTILINE)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    sources = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    ours = {"PATH": path, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        ["sh", "-c", f"{line} {' '.join(QUICK)} optim.warmup_steps=0"],
        cwd=tmp_path,
        env=os.environ | ours,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "runs" / "mine" / "summary.json").read_text())
    assert (summary["state"], summary["steps"], summary["layout"]["world_size"]) == ("finished", 3, 4)


def test_what_wandbs_agent_would_type_is_a_command() -> None:
    """``${args_no_hyphens}`` stands for KEY=VALUE of each parameter."""
    sweep = yaml.safe_load((ROOT / "examples" / "wandb_sweep.yaml").read_text())
    assert sweep["command"] == ["${program}", "train", "${args_no_hyphens}"]
    values = {name: (p.get("values") or [p.get("value", p.get("min"))])[0] for name, p in sweep["parameters"].items()}
    overrides = [f"{name}={value}" for name, value in values.items()]
    check_overrides(overrides)
    config = compose(*overrides)
    HydraConfig.instance().cfg = None  # nothing of Hydra is left behind
    assert {name: value_of(config, name) for name in values} == values
    assert sweep["metric"]["name"] == config.objective
