"""A comparison as a table for other programs."""

import csv
import re
from pathlib import Path

import pytest

from tedlab.errors import UsageError
from tests.compare.sweep import MIB, compare_command, write_run, write_sweep


def test_csv_has_numbers_as_measured(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    compare_command(str(tmp_path), "out=" + str(tmp_path / "new" / "t.csv"))
    with (tmp_path / "new" / "t.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [row["run"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["comm.dtd"] for row in rows] == ["false", "false", "true", "true"]
    assert [float(row["s/step"]) for row in rows] == pytest.approx([0.256, 0.246, 0.236, 0.226])
    assert [float(row["peak bytes"]) for row in rows] == [400 * MIB, 408 * MIB] * 2
    assert {row["times"] for row in rows} == {"measured"}
    assert "MFU share" not in rows[0], "what no run measured is no column"


def test_csv_says_which_times_were_measured(tmp_path: Path) -> None:
    for name, setting in (("0", {}), ("1", {"comm.emulate": "summit"}), ("2", {"sim.cluster": "summit"})):
        write_run(tmp_path / name, setting)
    compare_command(str(tmp_path), "out=" + str(tmp_path / "t.csv"), "force=true")
    with (tmp_path / "t.csv").open() as file:
        assert [row["times"] for row in csv.DictReader(file)] == ["measured", "emulated", "predicted"]


def test_latex_has_a_row_for_each_run_and_escapes_what_latex_would_take_for_its_own(tmp_path: Path) -> None:
    for number, name in enumerate(("a_b", "50%")):
        write_run(tmp_path / str(number), {"data.tokenizer": name}, {"perf/step_time_s": 0.1 * (number + 1)})
    compare_command(str(tmp_path), "out=" + str(tmp_path / "t.tex"), "force=true")
    lines = (tmp_path / "t.tex").read_text().splitlines()
    assert lines[0].startswith(r"\begin{tabular}{ll")
    assert lines[-1] == r"\end{tabular}"
    rows = [line for line in lines if re.match(r"\d", line)]
    assert [row.split(" & ")[1] for row in rows] == [r"a\_b", r"50\%"]
    assert r"200 $\times$2.00" in rows[1]
    assert all(line.count(" & ") == rows[0].count(" & ") for line in (*rows, lines[2]))


def test_the_baseline_can_be_any_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path)
    compare_command(str(tmp_path), "baseline=3")
    assert "× is the ratio to run 3." in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"baseline=4: there is no such run.*\nValid: 0, 1, 2, 3"):
        compare_command(str(tmp_path), "--baseline", "4")
