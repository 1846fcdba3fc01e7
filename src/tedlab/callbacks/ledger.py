"""The ledger of a run: what it communicated, compared with the closed form."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from tedlab.callbacks.journal import log
from tedlab.comm import TRAINING_PHASES, GroupKind
from tedlab.comm.ledger import Count, Entry, Ledger, Totals, differences, summed
from tedlab.config import TrainConfig
from tedlab.module import LanguageModel
from tedlab.predict.emulate import Emulation
from tedlab.predict.volumes import STEPPING, predict, stages, with_rows
from tedlab.strategy import TEDStrategy
from tedlab.tables import FittingTable

_MIB = 2**20


class CommunicationLedger(Callback):
    """Counts every collective of a run and compares the totals with the closed form at the end.

    Forward passes of validation are counted apart from those of training. Every ``comm.ledger.every`` steps the
    communication of a training step is logged, unless it equals what was logged last.

    Args:
        config: Configuration of a :class:`tedlab.module.LanguageModel`'s run, completed by
            :func:`tedlab.validate.check`.
        emulated: Makes the hook that delays collectives as a cluster's network would, from the ranks of each process
            group; see :class:`tedlab.predict.emulate.Emulation`.
    """

    def __init__(
        self,
        config: TrainConfig,
        emulated: Callable[[Mapping[GroupKind, range]], Emulation] | None = None,
    ) -> None:
        self.config = config
        self.emulated = emulated
        self.emulation: Emulation | None = None
        self.every = config.comm.ledger.every
        self.ledger = Ledger(config.comm.ledger.time)
        self._first_step = 0
        self._first_skipped = 0
        self._marked: tuple[int, dict[str, float]] = (0, {})  # step and totals at the last logging
        self._logged: dict[str, float] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = _strategy(trainer)
        comm = strategy.topology.comm
        if self.emulated is not None:
            self.emulation = self.emulated(strategy.topology.layout.groups(strategy.global_rank))
            comm.register_hook(self.emulation)
        comm.register_hook(self.ledger)  # after the emulation: a collective's time includes its delay
        self._first_step = trainer.global_step
        self._marked = trainer.global_step, {}
        self._first_skipped = _skipped(strategy)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ledger.standing_for = "validation"
        if self.emulation is not None:
            self.emulation.counting = False

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ledger.standing_for = None
        if self.emulation is not None:
            self.emulation.counting = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last_of_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self.every and last_of_step and trainer.global_step % self.every == 0:
            figures = self._per_step(trainer.global_step)
            if figures != self._logged:
                log(trainer, figures)
                self._logged = figures

    def steps(self, trainer: Trainer) -> int:
        """Returns the number of optimizer steps counted."""
        return trainer.global_step - self._first_step

    def overall(self, trainer: Trainer) -> dict[str, Any]:
        """Returns the values for the summary. Collective; call it after training.

        - ``comm/<phase>/<group>/<op>/{calls, payload_bytes, wire_bytes}``: this process's totals; ``seconds`` if timed;
        - ``comm/predicted_difference_bytes`` and ``…_calls``: the largest deviation of any process from the closed
          form, which must be 0;
        - ``comm/steps``: the number of steps counted;
        - ``comm/link/<link>/{wire_bytes, emulated_seconds}``: only with an emulated network;
        - ``router/recompute_flips``: expert choices that recomputation would have changed if they were not kept.
        """
        wrong = self.differences(trainer)
        own = [
            sum(abs(ours.payload_bytes - theirs.payload_bytes) for ours, theirs in wrong.values()),
            sum(abs(ours.calls - theirs.calls) for ours, theirs in wrong.values()),
            _strategy(trainer).topology.recomputation.flips,
        ]
        everybody: list[Any] = [None] * trainer.world_size
        with _strategy(trainer).topology.comm.place.within("gathering of totals"):
            dist.all_gather_object(everybody, own)
        size, calls, flips = map(max, zip(*everybody, strict=True))
        return {
            **self._metrics(),
            **({} if self.emulation is None else self.emulation.metrics()),
            "comm/steps": self.steps(trainer),
            "comm/predicted_difference_bytes": size,
            "comm/predicted_difference_calls": calls,
            "router/recompute_flips": flips,
        }

    def differences(self, trainer: Trainer) -> Mapping[Entry, tuple[Count, Count]]:
        """Returns the entries where this process's ledger differs from the closed form, as (counted, expected)."""
        skipped = _skipped(_strategy(trainer)) - self._first_skipped
        expected: dict[Entry, Count] = {}
        for stage, steps in stages(self.config, self._first_step, trainer.global_step):
            for entry, count in predict(stage, trainer.global_rank).items():
                # A step whose gradients overflowed is skipped and exchanges neither matrices nor parameters.
                times = steps - skipped if entry.tag in STEPPING else steps
                expected[entry] = expected.get(entry, Count()) + count * times
            skipped = 0  # what a step exchanges in the optimizer is the same in all stages
        assert isinstance(trainer.lightning_module, LanguageModel)
        moved = trainer.lightning_module.network.moved
        return differences(self.ledger.totals, with_rows(expected, self.config, moved))

    def table(self, trainer: Trainer) -> Table:
        """Returns a table for people of what the first process communicated per step."""
        title = "communication of the first process, per step"
        steps = max(1, self.steps(trainer))
        return traffic_table(title, self.ledger.totals, steps, self.ledger.timed, self.differences(trainer))

    def _per_step(self, step: int) -> dict[str, float]:
        """Returns the mean communication per training step since the last call, under the names of the totals."""
        totals = {name: v for name, v in self._metrics().items() if name.split("/")[1] in TRAINING_PHASES}
        (since, before), self._marked = self._marked, (step, totals)
        return {name: (value - before.get(name, 0)) / (step - since) for name, value in totals.items()}

    def _metrics(self) -> dict[str, float]:
        values = ["calls", "payload_bytes", "wire_bytes", *(["seconds"] if self.ledger.timed else [])]
        return {
            f"comm/{phase}/{kind}/{op}/{value}": getattr(count, value)
            for (phase, kind, op), count in summed(self.ledger.totals, "phase", "kind", "op").items()
            for value in values
        }


def traffic_table(
    title: str, totals: Totals, steps: int, timed: bool, wrong: Mapping[Entry, tuple[Count, Count]]
) -> Table:
    """Makes a table for people of what was communicated per step.

    Args:
        title: Title above the table.
        totals: Totals over all steps.
        steps: Number of steps.
        timed: Whether to show times.
        wrong: Differences from the closed form, as (counted, expected).
    """
    table = FittingTable(title=title)
    for heading in ("phase", "group", "operation"):
        table.add_column(heading)
    for heading in ("calls", "payload MiB", "wire MiB", *(["ms"] if timed else [])):
        table.add_column(heading, justify="right")
    before = ""
    for (phase, kind, op), count in summed(totals, "phase", "kind", "op").items():
        if phase not in TRAINING_PHASES:
            continue
        cells = [f"{count.calls / steps:g}", f"{count.payload_bytes / steps / _MIB:,.3f}"]
        cells.append(f"{count.wire_bytes / steps / _MIB:,.3f}")
        if timed:
            cells.append(f"{count.seconds / steps * 1e3:,.2f}")
        table.add_row(phase if phase != before else "", kind, op, *cells)
        before = phase
    table.caption = "equal to the closed form, call for call and byte for byte"
    if wrong:
        lines = (
            f"\n{' '.join(entry)}: {ours.calls} calls, {ours.payload_bytes} bytes; "
            f"expected {theirs.calls}, {theirs.payload_bytes}"
            for entry, (ours, theirs) in wrong.items()
        )
        table.caption = Text.assemble(("NOT what the closed form says:", "red"), *lines)
    return table


def _strategy(trainer: Trainer) -> TEDStrategy:
    assert isinstance(trainer.strategy, TEDStrategy)
    return trainer.strategy


def _skipped(strategy: TEDStrategy) -> int:
    return strategy.loss_scaler.skipped_steps if strategy.loss_scaler else 0
