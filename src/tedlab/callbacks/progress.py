"""One progress bar for a whole run, in steps, with losses, tokens/s and the time that is left."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from typing_extensions import override

_SHOWN = {
    "train/loss": "loss {:.3f}",
    "val/loss": "val {:.3f}",
    "perf/tokens_per_second": "{:,.0f} tokens/s",
}


class RunProgress(ProgressBar):
    """Lightning's bars count the micro-batches of one epoch; this one counts the optimizer steps of the run.

    Shown by the first process. Where output is not a terminal it is a line about every tenth of the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    @override
    def disable(self) -> None:
        self._enabled = False  # Lightning's way of silencing all processes but the first

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled or not sys.stderr.isatty():
            return
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}", style="cyan"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            Remaining(),
            console=Console(stderr=True),
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
        elif step % self._interval(trainer) == 0 or step == last:
            print(f"step {step}/{last}  {self._metrics(trainer)}", file=sys.stderr, flush=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    @staticmethod
    def _interval(trainer: Trainer) -> int:
        """About a tenth of the run, and a multiple of the steps between new values."""
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
