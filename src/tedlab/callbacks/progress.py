"""A progress bar over the steps of a whole run, with losses, tokens/s and the remaining time."""

import sys
import threading
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from typing_extensions import override

from tedlab.console import animated, errors

_SILENT_S = 60.0  # longest time without a line where output is not a terminal
_SHOWN = {
    "train/loss": "loss {:.3f}",
    "val/loss": "val {:.3f}",
    "perf/tokens_per_second": "{:,.0f} tokens/s",
}


class RunProgress(ProgressBar):
    """Shows the optimizer steps of the run, whereas Lightning's bars count the micro-batches of one epoch.

    Only the first process shows it. Where output is not a terminal, it prints a line about every tenth of the run and
    whenever a minute has passed without one, even if only to say that setup, a step or the end of the run still takes
    its time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._doing = "setting up"
        self._shown = ""  # metrics; only the main thread may read them, which may be a collective
        self._began = (0, 0.0)  # step and time, when training began
        self._last = 0.0  # time of the last line
        self._over = threading.Event()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._enabled and not animated(errors()):
            self._over, self._last = threading.Event(), time.monotonic()
            threading.Thread(target=self._remind, args=(trainer, self._over), daemon=True).start()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._over.set()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._doing = "validating"

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._doing = "training"
        self._shown = self._metrics(trainer)

    @override
    def disable(self) -> None:
        self._enabled = False  # Lightning's way of silencing all processes but the first

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._doing = "training"
        self._began = trainer.global_step, time.monotonic()
        if not self._enabled or not animated(errors()):
            return
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}", style="cyan"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            Remaining(),
            console=errors(),
        )
        self._task = self._bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, metrics="")
        self._bar.start()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, last = trainer.global_step, trainer.max_steps
        if not self._enabled or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._bar is not None:
            assert self._task is not None
            self._bar.update(self._task, completed=step, metrics=self._metrics(trainer))
        elif step % trainer.log_every_n_steps == 0 or step == last:  # type: ignore[attr-defined]
            self._shown = self._metrics(trainer)
            if step % self._interval(trainer) == 0 or step == last:
                self._print(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._doing = "finishing"
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._over.set()
        self._stop()

    def _remind(self, trainer: Trainer, over: threading.Event) -> None:
        """Prints a line whenever the last one is a minute old, as when the main thread waits for a device."""
        while not over.wait(max(0.0, self._last + _SILENT_S - time.monotonic())):
            if time.monotonic() >= self._last + _SILENT_S:
                self._print(trainer, self._doing)

    def _print(self, trainer: Trainer, doing: str = "training") -> None:
        self._last = time.monotonic()
        step, last = trainer.global_step, trainer.max_steps
        (first, began), parts = self._began, [f"step {step}/{last}", self._shown]
        if doing != "training":
            parts.append(doing)
        elif first < step < last:
            left = (last - step) * (self._last - began) / (step - first)
            parts.append(f"ETA {timedelta(seconds=round(left))}")
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)

    @staticmethod
    def _interval(trainer: Trainer) -> int:
        """Returns about a tenth of the run's steps, as a multiple of the steps between logged values."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every * max(1, round(trainer.max_steps / 10 / every))

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @staticmethod
    def _metrics(trainer: Trainer) -> str:
        known = trainer.callback_metrics
        return "  ".join(text.format(known[name].item()) for name, text in _SHOWN.items() if name in known)
