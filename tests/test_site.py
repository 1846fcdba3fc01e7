"""The documentation site builds without a warning, and has what its pages promise."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from tedlab.__main__ import COMMANDS
from tedlab.config import CommConfig

pytest.importorskip("material", reason="needs the extra 'docs'")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_reference_has_every_command_value_and_class(site: Path) -> None:
    commands, config, api = (
        (site / "docs" / "reference" / f"{name}.html").read_text() for name in ("commands", "config", "api")
    )
    assert all(f"tedlab {name}" in commands for name in COMMANDS)
    own = [field.name for field in fields(CommConfig) if field.name != "ledger"]  # which is a section
    assert [name for name in own if f"<code>{name}</code>" not in config] == []
    assert "comm.ledger" in config
    assert "chunks" in config
    assert "tensor_parallel_size" in api
    assert "The number of processes that share one layer" in api, "docstrings are taken apart into parameters"
    assert ":class:" not in api


def test_links_and_pictures_of_pages_exist(site: Path) -> None:
    found = [
        (page, link)
        for page in site.rglob("*.html")
        for link in re.findall(r'(?:href|src)="?([^"#?\s>]+)', page.read_text())
        if "://" not in link and not link.startswith(("data:", "mailto:", "/"))
    ]
    assert len(found) > 1000
    assert [(page.name, link) for page, link in found if not (page.parent / link).exists()] == []


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img)[^>]* src="?(https?:[^"]+)|<link[^>]* rel="stylesheet"[^>]* href="?(https?:[^"]+)',
            page.read_text(),
        )
        assert not loaded, page
