"""Lines of progress where output is not a terminal: about every tenth of a run, and at least one a minute."""

import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tedlab.callbacks import RunProgress, progress


def run(step: int = 0, last: int = 1000) -> Any:
    return SimpleNamespace(
        is_global_zero=True,
        global_step=step,
        max_steps=last,
        log_every_n_steps=10,
        accumulate_grad_batches=1,
        callback_metrics={"train/loss": torch.tensor(3.25), "perf/tokens_per_second": torch.tensor(1234.0)},
    )


def after(callback: RunProgress, trainer: Any, step: int) -> None:
    trainer.global_step = step
    callback.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]


def test_a_line_says_where_the_run_is_and_when_it_will_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    callback, trainer = RunProgress(), run(step=200)
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    for step in range(201, 401):
        clock[0] += 0.5
        after(callback, trainer, step)
    assert capsys.readouterr().err.splitlines() == [
        "step 300/1000  loss 3.250  1,234 tokens/s  ETA 0:05:50",  # 700 steps of half a second
        "step 400/1000  loss 3.250  1,234 tokens/s  ETA 0:05:00",
    ]


def test_there_is_a_line_when_there_was_none_for_a_while_whatever_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SILENT_S", 0.1)
    callback, trainer = RunProgress(), run()
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
    time.sleep(0.35)
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    after(callback, trainer, 10)
    time.sleep(0.35)  # a very long step
    callback.on_validation_start(trainer, None)  # type: ignore[arg-type]
    time.sleep(0.35)
    callback.teardown(trainer, None, "fit")  # type: ignore[arg-type]
    lines = capsys.readouterr().err.splitlines()
    kinds = [1 if "setting up" in line else 3 if "validating" in line else 2 for line in lines]
    assert kinds == sorted(kinds)
    assert all(kinds.count(kind) >= 2 for kind in (1, 2, 3)), lines
    assert re.fullmatch(r"step 10/1000  loss 3\.250  1,234 tokens/s  ETA [\d:]+", lines[kinds.index(2)])
    time.sleep(0.25)
    assert capsys.readouterr().err == ""


def test_a_reminder_asks_nobody_for_metrics(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To compute them may be a collective, in which the other processes would not join."""

    class Asked(SimpleNamespace):
        @property
        def callback_metrics(self) -> dict[str, Any]:
            raise AssertionError("asked")

    monkeypatch.setattr(progress, "_SILENT_S", 0.05)
    callback = RunProgress()
    values = vars(run())
    del values["callback_metrics"]
    callback.setup(Asked(**values), None, "fit")  # type: ignore[arg-type]
    time.sleep(0.2)
    callback.teardown(Asked(**values), None, "fit")  # type: ignore[arg-type]
    assert capsys.readouterr().err.startswith("step 0/1000  setting up\n")


def test_other_processes_than_the_first_are_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SILENT_S", 0.05)
    callback, trainer = RunProgress(), run()
    trainer.is_global_zero = False
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    after(callback, trainer, 100)
    time.sleep(0.15)
    assert capsys.readouterr().err == ""
