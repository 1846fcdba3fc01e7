"""The command line: tables on a terminal, and errors."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from tedlab.commands.compare import prepare
from tedlab.compare.comparison import compare
from tedlab.compare.runs import read_runs
from tedlab.compare.terminal import show
from tedlab.console import WIDTH
from tedlab.errors import UsageError
from tests.compare.sweep import STEPS, compare_command, ledger, write_run, write_sweep


def rows(text: str, table: str) -> list[list[str]]:
    """The cells of the table under this title."""
    body = text[text.index(table) :].split("└")[0]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in body.splitlines() if line.startswith("│")]


def test_a_sweep_is_one_row_a_run_in_three_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare_command(str(write_sweep(tmp_path)))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= WIDTH
    assert rows(text, "Results")[0] == ["0", "false", "false", "3.12603", "3.00127", "8,000", "256", "42.0", "400"]
    assert rows(text, "Results")[3] == [
        *("3", "true", "true", "3.12603", "3.00127"),
        *("8,000 ×1.00", "226 ×0.88", "28.0 ×0.67", "408 ×1.02"),
    ]
    assert rows(text, "Communication by phase")[2] == ["2", "true", "false", *["11.0"] * 3, "6.00", "39.0 ×0.93"]
    assert rows(text, "Communication by phase")[1][4] == "", "CAC recomputes no collective"
    assert rows(text, "Communication by operation and group")[1][3:] == ["3.00", "3.00", "8.00", "16.0", ""]
    assert "val/loss: identical to the last digit in all runs (3.001272439956665)." in text
    assert "comm.cac=true: bytes sent −28.6 … −28.2 %; step time −4.2 … −3.9 %; peak memory +2.0 %" in text


def test_tables_that_are_too_wide_are_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every setting and every number stays, in tables that fit."""
    settings = {f"optim.optimizer.some_rather_long_name_{number}": "value" * 10 for number in range(5)}
    for number, values in enumerate(({}, settings)):
        write_run(tmp_path / str(number), values, ledger(dtd=True, cac=False))
    compare_command(str(tmp_path))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "Settings (continued)" in text
    for key in settings:
        assert key in text
    assert rows(text, "Results")[1][-2:] == ["39.0 ×1.00", "400 ×1.00"]


def test_a_narrow_terminal_gets_narrow_tables(tmp_path: Path) -> None:
    console = Console(width=60, record=True, file=io.StringIO())
    show(compare(read_runs([write_sweep(tmp_path)])[0]), console)
    assert max(map(len, console.export_text().splitlines())) <= 60


def test_a_few_bytes_are_no_column_of_a_breakdown_but_of_the_total(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {f"comm/optimizer/world/all_reduce/{what}": 12 * STEPS for what in ("calls", "payload_bytes", "wire_bytes")}
    write_run(tmp_path / "0", None, ledger(dtd=False, cac=False) | few)
    compare_command(str(tmp_path), "--out", str(tmp_path / "r.html"))
    text = capsys.readouterr().out
    assert "in a step; less than 1 KiB is left out" in text
    assert "world" not in text
    row = r"<td>optimizer</td><td>all_reduce</td><td>world</td>(<td class=.number.>12</td>){3}"
    assert re.search(row, (tmp_path / "r.html").read_text()), "the report has every collective"


def test_old_runs_without_ledger_have_no_such_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        write_run(tmp_path / str(number), {"seed": number})
    compare_command(str(tmp_path))
    text = capsys.readouterr().out
    assert "Communication" not in text
    assert "sent" not in text


def test_settings_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets are markup to rich."""
    for number, value in enumerate(("[red]a[/red]", "[/]")):
        write_run(tmp_path / str(number), {"comm.cac": value})
    compare_command(str(tmp_path))
    text = capsys.readouterr().out
    assert [row[1] for row in rows(text, "Results")] == ["[red]a[/red]", "[/]"]
    assert "comm.cac=[/]:" in text


def test_emulated_times_are_marked_wherever_they_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    delays = {"comm/link/in_node/emulated_seconds": 0.2, "comm/link/between_nodes/emulated_seconds": 1.0}
    for number, cluster in enumerate((None, "summit")):
        summary = {**ledger(dtd=False, cac=False), **(delays if cluster else {})}
        write_run(tmp_path / str(number), {"comm.emulate": cluster}, summary)
    compare_command(str(tmp_path))
    text = capsys.readouterr().out
    assert rows(text, "Results")[1][4:6] == ["8,000† ×1.00", "256† ×1.00"]
    assert rows(text, "Results")[0][4:6] == ["8,000", "256"]
    assert rows(text, "Time of rank 0")[1][2:] == ["10.0†", "50.0†"]
    assert "step time unchanged †" in text
    assert "† Times of 1 include the delays of an emulated network (summit); none was measured." in text


@pytest.mark.parametrize(
    ("typed", "overrides"),
    [
        (["runs/a", "runs/b, c"], ["runs=['runs/a','runs/b, c']"]),
        (["runs/it's"], ["runs=['runs/it\\'s']"]),
        (["a", "--by", "comm.dtd,comm.cac", "--force"], ["by='comm.dtd,comm.cac'", "force=true", "runs=['a']"]),
        (["a", "by=comm.dtd,comm.cac", "force=true"], ["by='comm.dtd,comm.cac'", "force=true", "runs=['a']"]),
        (["--out=${x}.html", "runs=[a]"], ["out='\\${x}.html'", "runs=[a]"]),
        (["--help"], ["--help"]),
    ],
)
def test_directories_and_options_become_overrides(typed: list[str], overrides: list[str]) -> None:
    assert prepare(typed) == overrides


WRONG = {
    "nothing_to_compare": ([], "Give run or sweep directories"),
    "directories_and_server": (["x", "--wandb", "me/tedlab"], "Give run or sweep directories"),
    "server_without_group": (["--wandb", "me/tedlab"], "belong together"),
    "no_project": (["--wandb", "tedlab", "--group", "g"], "ENTITY/PROJECT"),
    "workspace_without_server": (["x", "--workspace"], "workspace=true needs wandb="),
    "report_of_another_kind": (["x", "--out", "report.pdf"], "must end in .html"),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_that_do_not_go_together_are_refused(name: str) -> None:
    arguments, said = WRONG[name]
    with pytest.raises(UsageError, match=said):
        compare_command(*arguments)


def test_runs_that_cannot_be_compared_end_the_command_with_words_and_no_traceback(tmp_path: Path) -> None:
    for number, size in enumerate((128, 256)):
        write_run(tmp_path / str(number), {"model.hidden": size})
    with pytest.raises(UsageError, match=r"cannot be compared[^:]*:\n  model.hidden is 128 in 0, 256 in 1\nforce=true"):
        compare_command(str(tmp_path))


def test_forced_comparisons_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, size in enumerate((128, 256)):
        write_run(tmp_path / str(number), {"model.hidden": size})
    compare_command(str(tmp_path), "--force", "--out", str(tmp_path / "r.html"))
    said = r"not alike, and their\s+losses do not mean the same: model.hidden is 128 in 0, 256 in 1"
    assert re.search(said, capsys.readouterr().out)
    assert re.search(said, (tmp_path / "r.html").read_text())
