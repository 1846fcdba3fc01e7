"""The loss scale by hand: when it is halved, when doubled, and that both survive a checkpoint."""

from tedlab.optim import LossScaler


def after(scaler: LossScaler, steps: str) -> float:
    """The scale after steps, each ``.`` or, with an overflow, ``!``."""
    for step in steps:
        scaler.update(step == "!")
    return scaler.scale


def test_the_scale_doubles_after_so_many_steps_without_overflow() -> None:
    scaler = LossScaler(8.0, growth_interval=3)
    assert [after(scaler, step) for step in "......"] == [8, 8, 16, 16, 16, 32]
    assert after(LossScaler(), "." * 1999) == 2.0**16
    assert after(LossScaler(), "." * 2000) == 2.0**17


def test_an_overflow_halves_it_down_to_one_and_the_count_starts_anew() -> None:
    scaler = LossScaler(4.0, growth_interval=3)
    assert [after(scaler, step) for step in "..!..."] == [4, 4, 2, 2, 2, 4]
    assert [after(scaler, step) for step in "!!!!"] == [2, 1, 1, 1]
    assert scaler.skipped_steps == 5


def test_a_restored_scale_goes_on_counting() -> None:
    scaler, restored = LossScaler(8.0, growth_interval=3), LossScaler(1.0, growth_interval=3)
    after(scaler, "!..")
    restored.load_state_dict(scaler.state_dict())
    assert after(restored, ".") == after(scaler, ".") == 8.0
    assert restored.skipped_steps == 1
