"""``benchmarks.plan_order``: it measures what a plan puts first, and says when another choice is faster."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import plan_order
from tedlab.cli import CONF
from tedlab.predict.plan.plan import Plan
from tedlab.predict.plan.search import Candidate, Found


def candidate(seconds: float, tensor: int, micro_batch: int) -> Candidate:
    settings = {"parallel.tensor": tensor, "data.micro_batch_size": micro_batch}
    return Candidate(settings, 0, seconds, 1.0, 0.5, 1, 0.0, "step")


def row(name: str, predicted: float, **found: Any) -> dict[str, Any]:
    row = {"settings": ["comm.cac=false", name], "predicted_s": predicted, "predicted_gib": 1.0}
    return row | {"predicted_range_s": (predicted / 2, predicted * 2)} | found


def test_choices_differ_in_more_than_the_size_of_micro_batches_and_the_last_is_there_once() -> None:
    simulated = [candidate(*one) for one in ((1.0, 1, 4), (2.0, 1, 2), (3.0, 2, 4), (4.0, 4, 4), (5.0, 8, 4))]
    plan, last = Plan(Found(), simulated, simulated), candidate(9.0, 1, 1)
    assert plan_order.chosen(plan, last, 3) == [*(simulated[n] for n in (0, 2, 3)), last]
    assert plan_order.chosen(plan, simulated[3], 3) == [simulated[n] for n in (0, 2, 3)]


def test_a_first_choice_that_is_not_the_fastest_shows() -> None:
    rows = [
        row("parallel.tensor=1", 1.0, measured_s=3.0, measured_gib=2.0),
        row("parallel.tensor=2", 2.0, measured_s=2.0, measured_gib=3.0),
        row("parallel.tensor=4", 0.5, error="Traceback\nout of memory"),
    ]
    console = Console(width=170)
    with console.capture() as shown:
        console.print(plan_order.table(rows, ""))
    first, second, third = (line.split() for line in shown.get().splitlines() if "tensor" in line)
    assert first == [
        "parallel.tensor=1",
        "1.0000",
        "0.5000",
        "to",
        "2.0000",
        "3.0000",
        "-66.7%",
        "2",
        "2",
        "1.00",
        "2.00",
    ]
    assert second[-4:] == ["3", "1", "1.00", "3.00"]
    assert "memory" in third
    assert "took 1.500 x the time of the fastest of 2 measured" in plan_order.verdict(rows)
    assert plan_order.verdict(rows[2:]) == "Nothing could be measured."


def test_a_machine_without_gpus_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["plan_order"])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SystemExit):
        plan_order.main()
    assert "there is no GPU; --tiny runs on a CPU" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_is_made_and_its_choices_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, cluster = tmp_path / "found.json", str(CONF / "cluster" / "this_machine.yaml")
    words = ["plan_order", "--tiny", "--cluster", cluster, "--first", "1", "--steps", "1", "--out", str(out), "--set"]
    fixed = ["model.layers=1", "parallel.tensor=2", "parallel.expert_tensor=2", "data.micro_batch_size=8"]
    monkeypatch.setattr("sys.argv", [*words, *fixed, "model.recompute.granularity=none"])
    plan_order.main()
    found = json.loads(out.read_text())
    assert found["processes"] == 2
    assert found["calibration"] == Path(cluster).read_text().splitlines()
    for row in found["rows"]:
        assert "error" not in row
        assert {"parallel.tensor=2", "data.micro_batch_size=8"} <= {*row["settings"]}
        assert row["predicted_range_s"][0] <= row["predicted_s"] <= row["predicted_range_s"][1]
        assert len(row["measured_steps_s"]) == 1


def test_the_plan_that_was_measured_chose_the_fastest_and_only_the_contrast_is_out_of_its_range() -> None:
    """As docs/truth.md says."""
    rows = json.loads((Path(plan_order.__file__).parent / "results" / "plan_order_h200_x2.json").read_text())["rows"]
    places = {key: [plan_order.place(row, rows, key) for row in rows] for key in ("predicted_s", "measured_s")}
    assert places["predicted_s"] == places["measured_s"] == [1, 2, 3, 4]
    assert "took 1.000 x the time of the fastest of 4 measured" in plan_order.verdict(rows)
    within = [row["predicted_range_s"][0] <= row["measured_s"] <= row["predicted_range_s"][1] for row in rows]
    assert within == [True, True, True, False]
    assert "data.micro_batch_size=1" in rows[3]["settings"]
