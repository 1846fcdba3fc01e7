"""Which runs a path stands for, and what is said of paths and runs that will not do."""

import json
from pathlib import Path
from typing import Any

import pytest

from tedlab.compare import runs as of_runs
from tedlab.compare.comparison import compare
from tedlab.compare.runs import logged, read_runs
from tedlab.errors import UsageError
from tests.compare.sweep import LOSSES, STEPS, compare_command, write_run, write_sweep


def test_a_sweep_is_its_jobs_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        write_run(tmp_path / str(number))
    (tmp_path / ".submitit").mkdir()
    runs, notes = read_runs([tmp_path])
    assert [run.name for run in runs] == ["0", "2", "10"]
    assert notes == []


def test_runs_keep_the_order_given_and_names_that_tell_them_apart(tmp_path: Path) -> None:
    """A directory that is given twice, or with its sweep, counts once."""
    for sweep in ("a", "b"):
        write_run(tmp_path / sweep / "0")
    runs, _ = read_runs([tmp_path / "b" / "0", tmp_path / "a", tmp_path / "b"])
    assert [run.name for run in runs] == ["b/0", "a/0"]


def test_a_run_holds_its_flat_configuration_and_curves_by_steps_done(tmp_path: Path) -> None:
    """The file counts the last finished step from 0, and the closing validation from 1."""
    ((run,), _) = read_runs([write_run(tmp_path / "run")])
    assert run.config["optim.optimizer.betas"] == [0.9, 0.95]
    assert run.config["choices.hydra/launcher"] == "basic"
    assert run.curves == {"train/loss": [(10, LOSSES[0]), (20, LOSSES[1])], "val/loss": [(STEPS, 3.001272439956665)]}


def test_a_run_that_counts_tokens_counts_the_steps_done(tmp_path: Path) -> None:
    """All its rows do, also that of the closing validation."""
    directory = write_run(tmp_path / "run")
    rows = [("step", "tokens", "train/loss", "val/loss"), (10, 1, 3.5, ""), (20, 2, 3.1, ""), (20, 2, "", 3.0)]
    (directory / "metrics.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    ((run,), _) = read_runs([directory])
    assert run.curves == {"train/loss": [(10, 3.5), (20, 3.1)], "val/loss": [(20, 3.0)]}


def test_a_run_that_failed_or_was_interrupted_is_left_out_unless_asked_for(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    for number, state in ((1, "failed"), (3, "interrupted")):
        ended = {"state": state, "reason": "why", "steps": 10}
        file = tmp_path / str(number) / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | ended))
    runs, notes = read_runs([tmp_path])
    assert [run.name for run in runs] == ["0", "2"]
    assert notes == [
        f"{tmp_path / '1'} is left out: it failed at step 10 (why); force=true compares it as far as it came.",
        f"{tmp_path / '3'} is left out: it was interrupted at step 10 (why); force=true compares it as far as it came.",
    ]
    runs, notes = read_runs([tmp_path], stopped=True)
    assert [run.name for run in runs] == ["0", "1 (failed at step 10)", "2", "3 (interrupted at step 10)"]
    assert notes == []
    assert len(compare(runs, force=True).runs) == 4


def test_a_run_that_has_not_finished_is_named_and_left_out(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    (tmp_path / "1" / "summary.json").unlink()
    (tmp_path / "2" / "summary.json").write_text('{"val/loss": 3.0')
    (tmp_path / "4").mkdir()
    (write_run(tmp_path / "5") / "summary.json").write_text("{}")
    runs, notes = read_runs([tmp_path])
    assert [run.name for run in runs] == ["0", "3"]
    reasons = {"1": "no summary.json", "2": "no whole JSON", "4": "no config.yaml", "5": "how many steps"}
    for note, (directory, reason) in zip(notes, reasons.items(), strict=True):
        assert note.startswith(f"{tmp_path / directory} is left out")
        assert reason in note


def test_an_old_run_without_metrics_or_ledger_is_read(tmp_path: Path) -> None:
    (write_run(tmp_path / "run") / "metrics.csv").unlink()
    ((run,), _) = read_runs([tmp_path / "run"])
    assert run.curves == {"train/loss": [], "val/loss": []}


def _nothing(folder: Path) -> Path:
    return folder / "ablatoin"


def _file(folder: Path) -> Path:
    return folder / "ablation" / "0" / "config.yaml"


def _no_run_below(folder: Path) -> Path:
    (folder / "notes").mkdir()
    return folder / "notes"


def _one_level_too_high(folder: Path) -> Path:
    return folder


def _unfinished(folder: Path) -> Path:
    for summary in folder.glob("ablation/*/summary.json"):
        summary.unlink()
    return folder / "ablation"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_nothing, ["no folder", "ablatoin", "Did you mean", "ablation?"]),
        (_file, ["config.yaml is a file", "ablation/0?"]),
        (_no_run_below, ["notes is no run directory", "none directly below"]),
        (_one_level_too_high, ["no run directory", "These hold runs: ", "/ablation"]),
        (_unfinished, ["no finished run", "ablation/0 is left out", "ablation/3 is left out"]),
    ],
)
def test_paths_without_runs_are_refused(tmp_path: Path, make, said: list[str]) -> None:
    write_sweep(tmp_path / "ablation")
    with pytest.raises(UsageError) as error:
        read_runs([make(tmp_path)])
    for words in said:
        assert words in str(error.value)


def change(directory: Path, **values: Any) -> None:
    """Puts values into a run's summary."""
    file = directory / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("state", ["x"], "['x']"),
        ("state", "\x1b[2J", r"\x1b[2J"),
        ("layout", [1], "[1]"),
        ("versions", "3", "'3'"),
        ("evaluations", {"x": 3}, "{'x': 3}"),
        ("steps", True, "True"),
        ("val/loss", "3.0", "'3.0'"),
        ("memory/peak_bytes", float("inf"), "inf"),
        ("perf/step_time_s", float("nan"), "nan"),
        ("parameters/total", 1 << 63, str(1 << 63)),
    ],
)
def test_a_run_whose_summary_no_run_writes_is_left_out(tmp_path: Path, key: str, value: Any, shown: str) -> None:
    write_run(tmp_path / "0")
    change(write_run(tmp_path / "1"), **{key: value})
    runs, notes = read_runs([tmp_path], stopped=True)
    assert [run.name for run in runs] == ["0"]
    (note,) = notes
    assert f"summary.json is damaged ({key} is " in note
    assert shown in note


def test_losses_of_a_run_that_diverged_are_no_damage(tmp_path: Path) -> None:
    change(write_run(tmp_path / "0"), **{"train/loss": float("nan"), "router/entropy": float("inf")})
    assert read_runs([tmp_path])[1] == []


def test_no_text_of_a_run_reaches_the_terminal_as_a_control(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of folders, keys and values of the configuration, groups of the ledger, and reasons of other people."""
    evil = "\x1b[2J\x9bX\u202eY\rZ"
    named = {"comm/forward/" + evil + "/all_reduce/" + what: 10**6 for what in ("calls", "payload_bytes", "wire_bytes")}
    write_run(tmp_path / f"a{evil}", {f"optim.{evil}": 1, "comm.dtd": evil, "comm.cac": [evil]}, named)
    write_run(tmp_path / "b", {"comm.dtd": evil + "2"}, named)
    change(write_run(tmp_path / f"c{evil}"), state="failed", reason=evil)
    (write_run(tmp_path / f"d{evil}") / "metrics.csv").write_text(f"step,tokens,train/loss\n1,1,{evil!r}\n")
    for extra in ([], ["force=true"]):
        compare_command(str(tmp_path), *extra)
        text = capsys.readouterr().out
        assert all(character.isprintable() for line in text.split("\n") for character in line)
        assert r"\x1b[2J\x9bX\u202eY" in "".join(text.split())
    with pytest.raises(UsageError) as error:
        compare_command(str(tmp_path), "by=optim.lrr")
    assert "\x1b" not in str(error.value)


def test_dates_in_a_configuration_are_texts(tmp_path: Path) -> None:
    file = write_run(tmp_path / "0") / "config.yaml"
    file.write_text(file.read_text() + "when: !!timestamp 2026-01-02\n")
    assert read_runs([tmp_path])[0][0].config["when"] == "2026-01-02"


def test_curves_are_read_in_a_time_that_grows_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    class Step(int):
        """Counts how often it is compared."""

        def __lt__(self, other: int) -> bool:
            nonlocal compared
            compared += 1
            return super().__lt__(other)

        def __gt__(self, other: int) -> bool:
            nonlocal compared
            compared += 1
            return super().__gt__(other)

    monkeypatch.setattr(of_runs, "int", Step, raising=False)
    rows = [{"step": str(step), "perf/step_time_s": "0.5"} for step in range(1, 1001)]
    assert logged(rows, 1000)["seconds"][1000] == 500.0
    assert 0 < compared <= 4 * len(rows)


def test_a_damaged_record_of_routing_is_refused_in_words(tmp_path: Path) -> None:
    """At its beginning, and in a step."""
    meta = json.dumps({"blocks": [1], "experts": 2, "top_k": 1, "tokens": 4})
    for number in range(2):
        record = write_run(tmp_path / str(number)) / "routing"
        record.mkdir()
        (record / "meta.json").write_text(meta)
        (record / "step-00000001-rank-0000.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(
        UsageError, match=r"0000\.npz is damaged .* Without its folder routing, the run can be compared"
    ):
        compare_command(str(tmp_path))
    (tmp_path / "1" / "routing" / "meta.json").write_text("{}")
    with pytest.raises(UsageError, match="1/routing is not the record of a run's routing"):
        compare_command(str(tmp_path))
