"""Stops a run of a search that does worse than earlier ones did by then, as one of Optuna's pruners judges."""

import logging
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from tedlab.history import UNREADABLE, read_history
from tedlab.launch.outcome import FINISHED, METRICS, PRUNED, read_summary
from tedlab.untrusted import flat


class Prune(Callback):
    """Asks a pruner after each validation whether to go on, and tells it what earlier runs of the sweep logged.

    Hydra's sweeper gives a job no trial of its own to report to. So the runs are read from their directories, where
    all of them are, and the pruner judges them as trials of a study of its own.

    Args:
        pruner: One of ``optuna.pruners``.
        directory: The run directory; the other runs of the sweep are beside it.
        monitor: The metric of validation that is to become small.
    """

    def __init__(self, pruner: Any, directory: str, monitor: str = "val/loss") -> None:
        self.pruner = pruner
        self.directory = Path(directory)
        self.monitor = monitor
        self._own: dict[int, float] = {}
        self._pruned: int | None = None

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self.monitor not in trainer.callback_metrics or self._pruned is not None:
            return
        step = trainer.global_step
        self._own[step] = trainer.callback_metrics[self.monitor].item()
        worse = trainer.is_global_zero and step < trainer.max_steps and self._is_worse()
        if trainer.strategy.broadcast(worse):  # other processes may see less of a shared file system
            self._pruned = step
            trainer.should_stop = True

    def outcome(self) -> dict[str, Any]:
        """Returns the entries of the summary of a run that was stopped; nothing of one that was not."""
        if self._pruned is None:
            return {}
        reason = f"{type(self.pruner).__name__}: {self.monitor} was {self._own[self._pruned]:.4g} then"
        return {"state": PRUNED, "reason": reason}

    def _is_worse(self) -> bool:
        import optuna

        logging.getLogger("optuna").setLevel(logging.WARNING)
        study = optuna.create_study(pruner=self.pruner)
        states = {FINISHED: optuna.trial.TrialState.COMPLETE, PRUNED: optuna.trial.TrialState.PRUNED}
        for other in sorted(self.directory.parent.iterdir()):
            state = states.get(str(read_summary(other).get("state"))) if other != self.directory else None
            try:
                rows = [] if state is None else read_history(other / METRICS)
                values = {int(row["step"]): float(row[self.monitor]) for row in rows if self.monitor in row}
            except UNREADABLE as error:
                said = f"{other / METRICS} is damaged, and its run does not count for the pruner: {error}"
                warnings.warn(flat(said), stacklevel=2)
                continue
            if values:
                study.add_trial(
                    optuna.trial.create_trial(state=state, value=values[max(values)], intermediate_values=values)
                )
        trial = study.ask()
        for step, value in self._own.items():
            trial.report(value, step)
        return trial.should_prune()
