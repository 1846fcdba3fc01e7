"""What a comparison says of settings, losses and savings."""

from pathlib import Path
from typing import Any

import pytest

from tedlab.compare.comparison import compare
from tedlab.compare.quantities import PEAK, SENT, STEP_TIME, significant, telling
from tedlab.compare.runs import Run, read_runs
from tedlab.compare.traffic import seconds_by_phase, traffic, wire_by, wire_total
from tedlab.errors import UsageError
from tests.compare.sweep import LOSSES, MIB, STEPS, SUMMARY, write_run, write_sweep


def runs_of(folder: Path, *settings: dict[str, Any], summaries: list[dict[str, Any]] | None = None) -> list[Run]:
    """A finished run for each of these settings."""
    for number, values in enumerate(settings):
        write_run(folder / str(number), values, summaries[number] if summaries else None)
    return read_runs([folder])[0]


# Settings


def test_only_settings_that_differ_are_shown_and_no_plumbing(tmp_path: Path) -> None:
    other = {
        "comm.dtd": True,
        "trainer.devices": 2,
        "experiment_name": "b",
        "choices.parallel": "tp4",
        "data.cache_dir": "elsewhere",
    }
    comparison = compare(runs_of(tmp_path, {}, {**other, "optim.optimizer.betas": [0.9, 0.99]}))
    assert comparison.settings == ["comm.dtd", "optim.optimizer.betas"]
    assert comparison.value(comparison.runs[1], "optim.optimizer.betas") == "[0.9, 0.99]"


def test_by_shows_exactly_the_settings_it_names(tmp_path: Path) -> None:
    comparison = compare(runs_of(tmp_path, {}, {"comm.dtd": True}), ["seed", "comm.cac"])
    assert comparison.settings == ["seed", "comm.cac"]


def test_by_of_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"by=comm.dtb: .*Did you mean 'comm.dtd'\?\nThose that differ: seed"):
        compare(runs_of(tmp_path, {}, {"seed": 1}), ["comm.dtb"])


def test_a_setting_that_an_older_run_did_not_have_is_marked(tmp_path: Path) -> None:
    comparison = compare(runs_of(tmp_path, {}, {"comm.fuse": True}))
    assert [comparison.value(run, "comm.fuse") for run in comparison.runs] == ["–", "true"]


def test_labels_are_brief_unless_that_is_ambiguous(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {}, {"comm.dtd": True, "optim.lr": 1, "moe.lr": 2})
    assert compare(runs, ["comm.dtd"]).label(runs[1]) == "1: dtd=true"
    assert compare(runs, ["optim.lr", "moe.lr"]).label(runs[1]) == "1: optim.lr=1, moe.lr=2"


# Runs that are not alike


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"model.hidden": 256}, "model.hidden is 128 in 0, 256 in 1"),
        ({"model.vocab_size": 512}, "model.vocab_size is 256 in 0, 512 in 1"),
        ({"moe.num_experts": 8}, "moe.num_experts is 4 in 0, 8 in 1"),
        ({"data.tokenizer": "bpe"}, "data.tokenizer is byte in 0, bpe in 1"),
        ({"data.path": "notes"}, "data.path is null in 0, notes in 1"),
        ({"trainer.max_steps": 40}, "trainer.max_steps is 20 in 0, 40 in 1"),
    ],
)
def test_runs_of_other_models_data_or_lengths_are_compared_by_force_only(
    tmp_path: Path, setting: dict[str, Any], said: str
) -> None:
    runs = runs_of(tmp_path, {}, setting)
    with pytest.raises(UsageError, match="cannot be compared") as error:
        compare(runs)
    assert said in str(error.value)
    assert "force=true" in str(error.value)
    assert said in compare(runs, force=True).notes[0]


def test_runs_that_stopped_at_different_steps_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="steps is 20 in 0, 12 in 1"):
        compare(runs_of(tmp_path, {}, {}, summaries=[{}, {"steps": 12}]))


def test_what_changes_no_maths_may_differ(tmp_path: Path) -> None:
    compare(runs_of(tmp_path, {}, {"model.recompute.granularity": "none", "parallel.tensor": 1, "seed": 1}))


def test_runs_with_other_sets_are_compared_with_a_note_for_each_that_is_another(tmp_path: Path) -> None:
    sets = [{"de": "de.txt", "en": "en.txt"}, {"de": "de.txt", "en": "other.txt"}, {}]
    values = [{f"eval.sets.{name}": path for name, path in each.items()} for each in sets]
    comparison = compare(runs_of(tmp_path, *values))
    assert comparison.settings == []
    assert comparison.notes == [
        'val/en was evaluated with {"path": "en.txt"} in 0, but with {"path": "other.txt"} in 1: '
        "its values do not mean the same."
    ]
    by_samples = compare(runs_of(tmp_path / "samples", *({**values[0], "eval.samples": count} for count in (1, 2))))
    assert [note.split(" was ")[0] for note in by_samples.notes] == ["val/de", "val/en"]


# Losses


def test_losses_are_identical_only_to_the_last_digit_at_every_step(tmp_path: Path) -> None:
    write_sweep(tmp_path / "same")
    train, val = compare(read_runs([tmp_path / "same"])[0]).loss_statements()
    assert train == (
        "train/loss: identical to the last digit in all runs (3.1260263919830322), "
        "at each of the 2 steps where it was logged."
    )
    assert val == "val/loss: identical to the last digit in all runs (3.001272439956665)."

    for name, losses in {"0": LOSSES, "1": LOSSES, "2": [LOSSES[0] + 1e-9, LOSSES[1]]}.items():
        write_run(tmp_path / "other" / name, losses=losses)
    comparison = compare(read_runs([tmp_path / "other"])[0])
    assert comparison.loss_statements()[0] == (
        "train/loss: identical to the last digit in runs 0, 1; the others differ by up to 1.0e-09."
    )
    assert [effect.loss_distance == 0.0 for effect in comparison.against_first()] == [True, False]


def test_a_run_of_the_last_release_has_its_settings_by_the_names_of_now(tmp_path: Path) -> None:
    old, new = runs_of(tmp_path, {"model.checkpoint": "none"}, {"model.recompute.granularity": "none"})
    assert compare([old, new]).differing == []
    assert old.config["model.recompute.granularity"] == "none"
    comparison = compare([old, new], ["model.checkpoint", "seed"])
    assert comparison.settings == ["model.recompute.granularity", "seed"]
    assert "model.checkpoint is now model.recompute.granularity" in comparison.notes[0]


def test_losses_are_written_with_the_digits_that_tell_them_apart() -> None:
    assert telling([3.1260263919830322, 3.1260266304016113]) == ["3.126026", "3.126027"]
    assert telling([3.0, 3.0, None]) == ["3.00000", "3.00000", "–"]
    assert telling([1.0, 1.0 + 2**-52]) == ["1.0000000000000000", "1.0000000000000002"]


def test_a_run_without_a_loss_is_not_said_to_agree(tmp_path: Path) -> None:
    comparison = compare(runs_of(tmp_path, {}, {}, {}, summaries=[{}, {}, {"val/loss": None}]))
    assert comparison.loss_statements()[1].startswith("val/loss: identical to the last digit in runs 0, 1 (")


def test_a_loss_that_is_no_number_agrees_with_no_other(tmp_path: Path) -> None:
    comparison = compare(runs_of(tmp_path, {}, {}, summaries=[{}, {"val/loss": float("nan")}]))
    assert comparison.loss_statements()[1] == "val/loss: the runs differ by up to inf."


# What changes brought


def test_each_setting_is_judged_by_runs_that_differ_in_nothing_else(tmp_path: Path) -> None:
    comparison = compare(read_runs([write_sweep(tmp_path)])[0])
    effects = {effect.change: effect for effect in comparison.effects()}
    assert list(effects) == ["comm.cac=true", "comm.dtd=true"]
    pairs = [(before.name, after.name) for before, after in effects["comm.cac=true"].pairs]
    assert pairs == [("0", "1"), ("2", "3")]
    assert effects["comm.cac=true"].changes(SENT) == pytest.approx([30 / 42 - 1, 28 / 39 - 1])
    assert effects["comm.dtd=true"].changes(PEAK) == [0, 0]
    assert effects["comm.dtd=true"].changes(STEP_TIME) == pytest.approx([0.236 / 0.256 - 1, 0.226 / 0.246 - 1])


def test_settings_that_are_not_shown_still_tell_runs_apart(tmp_path: Path) -> None:
    comparison = compare(read_runs([write_sweep(tmp_path)])[0], by=["comm.dtd"])
    (dtd,) = (effect for effect in comparison.effects() if effect.change == "comm.dtd=true")
    assert [(before.name, after.name) for before, after in dtd.pairs] == [("0", "2"), ("1", "3")]


def test_the_headline_is_the_largest_saving_of_bytes(tmp_path: Path) -> None:
    headline = compare(read_runs([write_sweep(tmp_path)])[0]).headline()
    assert headline is not None
    assert headline.change == "comm.dtd=true, comm.cac=true"
    assert headline.changes(SENT) == pytest.approx([-1 / 3])


def test_runs_that_differ_in_several_settings_are_judged_as_a_whole(tmp_path: Path) -> None:
    comparison = compare(runs_of(tmp_path, {}, {"parallel.world_size": 2, "parallel.tensor": 1}))
    assert [effect.change for effect in comparison.effects()] == ["parallel.world_size=2, parallel.tensor=1"]
    assert comparison.headline() is None, "nothing was saved"


def test_one_run_is_a_table_without_comparisons(tmp_path: Path) -> None:
    comparison = compare(runs_of(tmp_path, {}))
    assert comparison.effects() == comparison.loss_statements() == []
    assert comparison.headline() is None
    assert comparison.ratio(comparison.runs[0], STEP_TIME) is None


# Traffic


def test_bytes_per_step_leave_out_what_is_no_training(tmp_path: Path) -> None:
    run = read_runs([write_sweep(tmp_path)])[0][2]
    assert wire_total(run) == 39 * MIB
    by_phase = {phase: size / MIB for (phase,), size in wire_by(traffic(run), "phase").items()}
    assert by_phase == {"forward": 11, "recompute": 11, "backward": 11, "optimizer": 6}
    assert {op: size / MIB for (op,), size in wire_by(traffic(run), "op").items()} == {
        "all_reduce": 24,
        "all_gather": 6,
        "all_to_all": 6,
        "reduce_scatter": 3,
    }
    assert seconds_by_phase(run) == pytest.approx(
        {"forward": 0.003, "recompute": 0.003, "backward": 0.003, "optimizer": 0.002}
    )
    assert traffic(run)[0].calls == 6


def test_a_continued_run_is_divided_by_the_steps_that_its_ledger_counted(tmp_path: Path) -> None:
    half = {"comm/steps": STEPS // 2, "comm/forward/tensor/all_reduce/calls": 30}
    (run,) = runs_of(tmp_path, {"ckpt_path": "last.ckpt"}, summaries=[half])
    assert traffic(run)[0].calls == 3
    assert compare([run]).notes == []


def test_a_run_without_ledger_is_not_a_run_that_sent_nothing(tmp_path: Path) -> None:
    """One process communicates nothing, and knows it."""
    summaries: list[dict[str, Any]] = [{}, {"comm/predicted_difference_bytes": 0}]
    assert [wire_total(run) for run in runs_of(tmp_path, {}, {}, summaries=summaries)] == [None, 0]


# Notes


def test_what_a_reader_must_know_is_noted(tmp_path: Path) -> None:
    summaries = [
        {"comm/predicted_difference_bytes": -128},
        {"comm/link/between_nodes/emulated_seconds": 0.1 * STEPS},
        {},
    ]
    settings: list[dict[str, Any]] = [{}, {"comm.emulate": "summit"}, {"ckpt_path": "last.ckpt"}]
    notes = compare(runs_of(tmp_path, *settings, summaries=summaries), notes=["4 is left out."]).notes
    for words in ("4 is left out.", "Run 0 communicated -128 bytes", "1 include", "(summit)", "Run 2 was continued"):
        assert any(words in note for note in notes), words


def test_numbers_keep_three_digits_and_never_an_exponent() -> None:
    values = {0.0: "0", 1234567.0: "1,234,567", 56.78: "56.8", 1.0: "1.00", 0.00001234: "0.0000123", -56.78: "-56.8"}
    assert {value: significant(value) for value in values} == values
    assert SUMMARY["steps"] == STEPS
