"""The study of a run that is killed: what it looks for in runs, and all of it with a small model."""

import json
import subprocess
import sys
import time
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
        command = Path(f"/proc/{worker}/cmdline")
        while command.read_text().split("\0")[-2] == waits:  # it is still a copy of its parent
            time.sleep(0.01)
        assert command.read_text().split("\0")[-2] == "input()"
        launcher.communicate(b"\n")


def test_the_readme_has_what_the_small_model_gave() -> None:
    folder = Path(resumed.__file__).parent
    found, text = json.loads((folder / "tiny.json").read_text()), (folder / "README.md").read_text()
    ours, again = found["killed_beside_reference"], found["resumed_beside_killed"]
    assert f"| four processes beside one | {ours['steps']} | {ours['largest']:.1e} |".replace("e-0", "e-") in text
    assert f"two processes beside the four | {again['steps']} | {again['largest']:g} |" in text


def test_the_readmes_have_what_gpus_gave() -> None:
    folder = Path(resumed.__file__).parent
    found = json.loads((folder / "results.json").read_text())
    text = " ".join((folder / "README.md").read_text().split())
    runs = found["runs"]
    killed, again, one = runs["killed"], runs["resumed"], runs["reference"]
    for label, run, at_80 in (
        ("| `parallel=ep4` on four, up to step 100 |", killed, f"{killed['val_loss']['80']:.2f} "),
        ("| `parallel=ep2` on two, from step 80 to 240 |", again, ""),
        ("| one, up to step 100 |", one, f"{one['val_loss']['80']:.2f} "),
    ):
        dead = f"{100 * run['dead_experts'][max(run['dead_experts'], key=int)]:.0f} %"
        speed = f"{run['tokens_per_second']:,.0f} | {100 * run['mfu']:.1f} %"
        assert f"{label} {speed} | {at_80}| {dead} |" in text
    after = [f"{abs(again['loss'][step] - killed['loss'][step]):.4f}" for step in ("85", "90", "95", "100")]
    assert f"by {after[0]}, {after[1]}, {after[2]} and {after[3]} nats at steps 85 to 100" in text
    assert f"to {again['val_loss']['240']:.3f} in validation at step 240" in text
    difference = {int(step): killed["loss"][step] - one["loss"][step] for step in one["loss"]}
    late = [abs(value) for step, value in difference.items() if step >= 35]
    most, mean = max(late), sum(late) / len(late)
    early = f"the loss of four is {-difference[15]:.2f} lower at step 15 and {difference[30]:.2f} higher at step 30"
    assert f"{early}, and differs by at most {most:.2f} from step 35 on, by {mean:.3f} in the mean" in text
    assert max(map(abs, difference.values())) == abs(difference[15])
    assert all(value > 0 for step, value in difference.items() if step >= 20)
    assert f"always the higher one, by {difference[100]:.2f} at the end" in text
    norms, dead = ([max(run[name].values()) for run in (killed, one)] for name in ("gradient_norm", "dead_experts"))
    assert f"gradient norm is up to {max(norms):.0f} before clipping, and up to {100 * max(dead):.0f} % of" in text
    schedule = [given for given in found["overrides"] if given.startswith(("optim.warmup", "optim.schedule"))]
    assert sorted(schedule) == ["optim.schedule=constant", "optim.warmup_steps=20"]
    assert "The learning rate rises for 20 steps and then stays" in text
    assert f"over {found['seconds']['from_kill_to_end']:.1f} s after its process was killed" in text
    summary = (folder.parent / "README.md").read_text()
    assert f"are within {most:.2f} nats from step 35 on, and two go on within 0.04" in summary
    assert max(map(float, after)) < 0.04


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
