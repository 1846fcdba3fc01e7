"""Losses over steps, tokens or time; smoothed; averaged over seeds; and of runs that go on or broke."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from tedlab.compare import charts
from tedlab.compare.comparison import View, compare
from tedlab.compare.runs import Run, read_runs
from tedlab.compare.seeds import averaged, band, deviation
from tedlab.errors import UsageError
from tedlab.launch.locks import RUN_LOCK, Lock
from tests.compare.sweep import STEPS, compare_command, write_run


def write_timed(directory: Path, seed: int = 0, lr: float = 0.1, losses: tuple[float, ...] = (4.0, 2.0)) -> Path:
    """A run of 1,000 tokens a step, of which it logged every tenth; the first ten took 1 s each, later ones 0.5 s."""
    write_run(directory, {"seed": seed, "optim.lr": lr}, {"train/loss": losses[-1], "val/loss": losses[-1] + 0.5})
    with (directory / "metrics.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, ["step", "tokens", "train/loss", "perf/step_time_s", "val/loss"])
        rows.writeheader()
        for index, loss in enumerate(losses):
            step = 10 * (index + 1)
            pace = 0.5 if index else 1.0
            rows.writerow({"step": step, "tokens": 1000 * step, "train/loss": loss, "perf/step_time_s": pace})
        rows.writerow({"step": STEPS, "tokens": 1000 * STEPS, "val/loss": losses[-1] + 0.5})
    return directory


def lines(runs: list[Run], **view: Any) -> list[tuple[list[float], list[float]]]:
    """What the chart of losses draws, line by line."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn(runs, **view).axes[0].lines]


def drawn(runs: list[Run], force: bool = False, **view: Any) -> Figure:
    figure = charts._losses(compare(runs, force=force, view=View(**view)), charts.LIGHT)
    assert figure is not None
    return figure


# The axis


@pytest.mark.parametrize(
    ("x", "train", "validation", "label"),
    [
        ("step", [10, 20], [20], "step"),
        ("tokens", [10_000, 20_000], [20_000], "tokens read"),
        ("time", [10.0, 15.0], [15.0], "training without validation, s"),
    ],
)
def test_losses_are_drawn_over_steps_tokens_or_time(
    tmp_path: Path, x: str, train: list[float], validation: list[float], label: str
) -> None:
    runs, _ = read_runs([write_timed(tmp_path / "0")])
    assert lines(runs, x=x) == [(train, [4.0, 2.0]), (validation, [2.5])]
    assert drawn(runs, x=x).axes[0].get_xlabel() == label


def test_a_step_between_or_after_those_logged_is_placed_at_the_rate_around_it(tmp_path: Path) -> None:
    ((run,), _) = read_runs([write_timed(tmp_path / "0")])
    assert charts._axis(run, "time", [5, 15, 24]) == [5.0, 12.5, 17.0]
    assert charts._axis(run, "tokens", [5, 24]) == [5_000.0, 24_000.0], "also before the first"


def test_hours_of_training_are_drawn_as_hours(tmp_path: Path) -> None:
    ((run,), _) = read_runs([write_timed(tmp_path / "0")])
    run.seconds.update({10: 3600.0, 20: 9000.0})  # type: ignore[attr-defined]
    assert lines([run], x="time")[0][0] == [1.0, 2.5]


def test_a_run_that_did_not_log_the_axis_is_named_and_not_drawn(tmp_path: Path) -> None:
    runs, _ = read_runs([write_timed(tmp_path / "0"), write_run(tmp_path / "1", {"optim.lr": 0.1})])
    assert len(lines(runs, x="tokens")) == 2, "two lines of run 0"
    (note,) = compare(runs, view=View(x="tokens")).notes
    assert note == "Run 1 is not in the chart of losses: it did not log tokens."
    assert compare(runs).notes == []


# Smoothing


def test_smoothing_weighs_what_came_before_and_starts_at_the_first_value() -> None:
    """By hand: (0.5·4 + 0.25·… ) / weights: 4; (0.5·4 + 1·2)/1.5; (0.25·4 + 0.5·2 + 1·1)/1.75."""
    curve = [(1, 4.0), (2, 2.0), (3, 1.0)]
    assert [loss for _, loss in charts.smoothed(curve, 0.5)] == pytest.approx([4.0, 4 / 1.5, 3 / 1.75])
    assert charts.smoothed(curve, 0.0) == curve


def test_a_loss_that_is_no_number_does_not_spread() -> None:
    curve = [(1, 4.0), (2, float("nan")), (3, 4.0)]
    assert [loss for _, loss in charts.smoothed(curve, 0.9)] == pytest.approx([4.0, float("nan"), 4.0], nan_ok=True)


def test_the_chart_shows_smooth_lines_before_the_losses_themselves(tmp_path: Path) -> None:
    runs, _ = read_runs([write_timed(tmp_path / "0")])
    faint, smooth, _ = lines(runs, smoothing=0.5)
    assert faint[1] == [4.0, 2.0]
    assert smooth[1] == pytest.approx([4.0, 4 / 1.5])


# Seeds


def seeds(folder: Path) -> list[Run]:
    """Two learning rates by three seeds, seeds first."""
    for number in range(6):
        seed, rate = divmod(number, 2)
        write_timed(folder / str(number), seed, 0.1 * (rate + 1), (4.0 + seed, 2.0 + rate + 0.1 * seed))
    return read_runs([folder])[0]


def test_runs_that_differ_in_their_seed_alone_are_one_with_means(tmp_path: Path) -> None:
    first, second = averaged(seeds(tmp_path))
    assert (first.name, second.name) == ("0+2+4", "1+3+5")
    assert first.number("train/loss") == pytest.approx(2.1)
    assert deviation(first, "train/loss") == pytest.approx(0.1)
    assert first.curves["train/loss"] == [(10, 5.0), (20, pytest.approx(2.1))]
    lowest, highest = band(first, "train/loss")
    assert (lowest[0], highest[0]) == ((10, 4.0), (10, 6.0))
    assert first.seconds[20] == pytest.approx(15.0)
    assert first.summary["steps"] == STEPS
    assert isinstance(first.summary["steps"], int)
    comparison = compare([first, second])
    assert comparison.settings == ["optim.lr"], "the seeds are the same"
    assert [effect.change for effect in comparison.effects()] == ["optim.lr=0.2"]


def test_a_run_that_broke_is_not_averaged_with_whole_ones(tmp_path: Path) -> None:
    runs = seeds(tmp_path)
    runs[2].summary.update({"steps": 10, "state": "failed"})  # type: ignore[attr-defined]
    assert [run.name for run in averaged(runs)] == ["0+4", "1+3+5", "2"]


def test_runs_that_were_evaluated_otherwise_are_not_averaged(tmp_path: Path) -> None:
    runs = seeds(tmp_path)
    for run, path in zip(runs[::2], ("wiki.txt", "wiki.txt", "books.txt"), strict=True):
        run.config["eval.sets.x"] = path  # type: ignore[index]
    for run, stride in zip(runs[1::2], (4, 8, 8), strict=True):
        run.summary["evaluations"] = {"x": {"stride": stride}}  # type: ignore[index]
    assert [run.name for run in averaged(runs)] == ["0+2", "1", "3+5", "4"]


def test_nothing_to_average_is_an_error(tmp_path: Path) -> None:
    write_timed(tmp_path / "0", seed=0, lr=0.1)
    write_timed(tmp_path / "1", seed=1, lr=0.2)
    with pytest.raises(UsageError, match="no two of these runs differ in nothing but their seed"):
        averaged(read_runs([tmp_path])[0])


def test_what_only_some_members_measured_has_no_mean(tmp_path: Path) -> None:
    runs = seeds(tmp_path)
    runs[0].summary["perf/mfu"] = 0.4  # type: ignore[index]
    assert averaged(runs)[0].number("perf/mfu") is None


def test_tables_and_report_show_deviations_and_bands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = seeds(tmp_path / "sweep")
    out = tmp_path / "report.html"
    compare_command(str(tmp_path / "sweep"), "--seeds", "--x", "tokens", "--smoothing=0.5", f"out={out}", "baseline=3")
    text = capsys.readouterr().out
    assert "3.10000 ±0.1" in text
    assert "× is the ratio to run 1+3+5." in text, "a member stands for its mean"
    page = out.read_text()
    assert "bands reach from lowest to highest" in page
    assert sweep[4].source in page
    (area,) = drawn(averaged(sweep)[:1], x="tokens").axes[0].collections
    assert area.get_paths()[0].get_extents().ymax == 6.0
    for name in ("table.csv", "table.tex"):
        compare_command(str(tmp_path / "sweep"), "seeds=true", f"out={tmp_path / name}")
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert float(rows[0]["train/loss deviation"]) == pytest.approx(0.1)
    assert r"2.10000 $\pm$0.1" in (tmp_path / "table.tex").read_text()


# Runs that go on, or broke


def test_a_run_that_goes_on_or_was_killed_is_compared_as_far_as_it_came(tmp_path: Path) -> None:
    """Even in the middle of writing a row. Neither has a summary; the lock tells which one goes on."""
    for number in range(3):
        write_timed(tmp_path / str(number))
    for number in (1, 2):
        (tmp_path / str(number) / "summary.json").unlink()
        lines = (tmp_path / str(number) / "metrics.csv").read_text().splitlines()
        (tmp_path / str(number) / "metrics.csv").write_text("\n".join([*lines[:2], "20,200"]))
    lock = Lock.on(tmp_path / "1" / RUN_LOCK)
    assert lock is not None
    runs, notes = read_runs([tmp_path])
    assert [run.name for run in runs] == ["0"]
    assert notes == [
        f"{tmp_path / '1'} is left out: it is running, now at step 10; force=true compares it as far as it came.",
        f"{tmp_path / '2'} is left out: it was killed at step 10 (there is no summary.json); "
        "force=true compares it as far as it came.",
    ]
    runs, _ = read_runs([tmp_path], stopped=True)
    assert [run.name for run in runs] == ["0", "1 (running at step 10)", "2 (killed at step 10)"]
    assert [run.curves["train/loss"] for run in runs] == [[(10, 4.0), (20, 2.0)], [(10, 4.0)], [(10, 4.0)]]
    comparison = compare(runs, force=True)
    assert comparison.loss_statements()[0].startswith(
        "train/loss: identical to the last digit where two runs logged it"
    )
    assert [effect.loss_distance for effect in comparison.against_first()] == [0.0, 0.0], "at the step that both have"
    crosses = [line for line in drawn(runs, force=True).axes[0].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[10], [10]]
    assert "× marks where a run stands" in charts.charts(comparison)[0].caption
    del lock


def test_a_broken_run_is_shown_as_such_in_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_timed(tmp_path / "0")
    file = write_timed(tmp_path / "1") / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"state": "failed", "steps": 10, "reason": "why"}))
    compare_command(str(tmp_path), "--force")
    text = capsys.readouterr().out
    assert "1 (failed at step 10)" in text
    assert "steps is 20 in 0, 10 in 1 (failed at step 10)" in " ".join(text.split())


def test_a_run_that_stands_at_its_beginning_is_drawn_there(tmp_path: Path) -> None:
    """It knows one position alone, from which no rate follows."""
    write_timed(tmp_path / "0")
    begun = write_timed(tmp_path / "1")
    (begun / "summary.json").unlink()
    (begun / "metrics.csv").write_text("step,tokens,val/loss\n0,0,5.5\n")
    runs, _ = read_runs([tmp_path], stopped=True)
    assert charts._axis(runs[1], "tokens", [0, 3]) == [0.0, 0.0]
    figure = charts._losses(compare(runs, force=True, view=View(x="tokens")), charts.LIGHT)
    assert figure is not None
    assert ([0.0], [5.5]) in [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines]


@pytest.mark.parametrize(("given", "kept"), [([None, 1], [1, None]), ([[2], 1], [1, [2]]), ([10, 9], [9, 10])])
def test_seeds_of_any_kind_are_averaged_over(tmp_path: Path, given: list[Any], kept: list[Any]) -> None:
    for number, seed in enumerate(given):
        write_timed(tmp_path / str(number), seed=seed)
    (mean,) = averaged(read_runs([tmp_path])[0])
    assert mean.config["seed"] == kept


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1.7e308])
def test_losses_that_have_no_mean_are_no_number(tmp_path: Path, loss: float) -> None:
    write_timed(tmp_path / "0", 0, losses=(4.0, loss))
    write_timed(tmp_path / "1", 1, losses=(4.0, 1e308 if loss == 1.7e308 else -loss))
    (mean,) = averaged(read_runs([tmp_path])[0])
    assert deviation(mean, "train/loss") is None
    assert math.isnan(mean.summary["train/loss"])
    assert mean.curves["train/loss"][0] == (10, 4.0)
    assert math.isnan(mean.curves["train/loss"][1][1])
