"""Notebooks say what their cells print today, and the runner tells when they do not."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from docs.notebooks import differences, markdown, notebooks, run
from tests.commands import run_forked


def notebook(*sources: str, tags: tuple[str, ...] = ()) -> dict:
    cells = [
        {"cell_type": "code", "metadata": {"tags": list(tags)}, "source": source, "outputs": []} for source in sources
    ]
    return {"cells": cells}


def test_a_cell_has_what_it_prints_and_its_last_value(tmp_path: Path) -> None:
    done = run(notebook("x = 2\nprint('two', x)", "x + 1", "x = 4", "print(x); None"), tmp_path)
    shown = [
        ["".join(output.get("text") or output["data"]["text/plain"]) for output in cell["outputs"]]
        for cell in done["cells"]
    ]
    assert shown == [["two 2\n"], ["3"], [], ["4\n"]]
    assert "```text\ntwo 2\n```" in markdown(done)


def test_a_figure_is_a_picture_with_its_label(tmp_path: Path) -> None:
    source = "from matplotlib.figure import Figure\nfigure = Figure(label='a line')\nfigure"
    assert "![a line](data:image/png;base64," in markdown(run(notebook(source), tmp_path))


def test_other_outputs_are_found(tmp_path: Path) -> None:
    """Numbers of measured cells may differ, words may not."""
    for tags, other, found in (
        ((), "loss 3.2", 1),
        (("measured",), "loss 3.2", 0),
        (("measured",), "less 3.1", 1),
    ):
        before = run(notebook("print('loss 3.1')", tags=tags), tmp_path)
        after = copy.deepcopy(before)
        after["cells"][0]["outputs"][0]["text"] = [f"{other}\n"]
        assert len(differences(before, after)) == found


def run_quickly(command: Sequence[str], **how: object) -> "subprocess.CompletedProcess[str]":
    """In place of ``subprocess.run``: the pool's server has imported what commands import."""
    assert [*command[:3]] == [sys.executable, "-m", "tedlab"]
    assert how == {"capture_output": True, "text": True, "check": True}
    done = run_forked("tedlab", command[3:], Path.cwd(), {**os.environ, "OMP_NUM_THREADS": "1"}, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_a_notebook_says_what_it_prints(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = json.loads(path.read_text())
    assert kept["nbformat"] == 4
    monkeypatch.setattr(subprocess, "run", run_quickly)
    assert differences(kept, run(kept, tmp_path)) == []
