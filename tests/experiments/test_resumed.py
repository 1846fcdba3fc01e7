"""The study of a run that is killed: what it looks for in runs, and all of it with a small model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import experiments.resumed.__main__ as resumed
from experiments.resumed.__main__ import differences, main, workers


def test_losses_are_compared_where_both_runs_have_them() -> None:
    found = differences({5: 2.0, 10: 1.5, 15: 1.0}, {10: 1.25, 15: 1.125, 20: 0.0})
    assert found == {"steps": 2, "largest": 0.25, "mean": 0.1875}


def test_workers_are_the_children_of_a_process_s_children() -> None:
    waits = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    server = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with subprocess.Popen([sys.executable, "-c", server, waits], stdin=subprocess.PIPE) as launcher:
        found: list[int] = []
        while not found and launcher.poll() is None:
            found = workers(launcher.pid)
        (worker,) = found
        assert Path(f"/proc/{worker}/cmdline").read_text().split("\0")[-2] == "input()"
        launcher.communicate(b"\n")


def test_the_readme_has_what_the_small_model_gave() -> None:
    folder = Path(resumed.__file__).parent
    found, text = json.loads((folder / "tiny.json").read_text()), (folder / "README.md").read_text()
    ours, again = found["killed_beside_reference"], found["resumed_beside_killed"]
    assert f"| four processes beside one | {ours['steps']} | {ours['largest']:.1e} |".replace("e-0", "e-") in text
    assert f"two processes beside the four | {again['steps']} | {again['largest']:g} |" in text
    assert f"over {found['seconds']['from_kill_to_end']:.1f} s after" in text


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_in_another_layout_with_the_losses_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["resumed", "--tiny", "--gpus", "2", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    )
    main()
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["codes"] == {"resumed": 0, "reference": 0}
    assert found["killed_beside_reference"]["steps"] == 20
    assert found["killed_beside_reference"]["largest"] < 1e-5
    assert found["resumed_beside_killed"]["steps"] >= 4
    assert found["resumed_beside_killed"]["largest"] < 1e-5
    assert max(map(int, found["runs"]["resumed"]["loss"])) == 240
    assert (tmp_path / "loss.png").stat().st_size > 10_000
