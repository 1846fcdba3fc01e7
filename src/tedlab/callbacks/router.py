"""Logs router health: scalars whenever metrics are logged, and occasionally a picture of every expert's load."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from tedlab.callbacks.journal import log
from tedlab.moe import RouterReport, relative_load, router_health, routes_own_tokens
from tedlab.tracking import load_chart

PICTURE = "router_load.png"
DATA = "router_load.json"
TRACE = "router_trace.npz"
_WRITTEN_CELLS = 200  # the picture shows values in its cells if it has at most this many


class RouterHealth(Callback):
    """Logs :func:`tedlab.moe.router_health` as ``router/…``, and draws the load of a step by layer and expert.

    It averages the routers' reports (``routers`` in the result of ``training_step``) over a step's micro-batches and
    all processes. This takes one collective each time metrics are logged and at the last step; in between nothing is
    reduced and no value is read from the device.

    ``router_load.png`` and ``router_load.json`` in the run directory show the last step drawn; W&B keeps all pictures.
    ``router_trace.npz`` covers every step whose metrics were logged: ``step`` (n,), ``block`` (L,), and ``load``
    (n, L, E), the number of choices that fell on each expert.

    Args:
        blocks: Indices of the blocks with experts.
        directory: The run directory.
        picture_every: Number of steps between pictures, each drawn at the next logged step; None draws only at the end.
    """

    def __init__(self, blocks: Sequence[int], directory: Path, picture_every: int | None) -> None:
        self.blocks = blocks
        self.directory = directory
        self.picture_every = picture_every
        self._micro_batches: list[RouterReport] = []
        self._latest: tuple[int, RouterReport] | None = None  # step, and its averages over micro-batches and processes
        self._drawn = 0  # the step of the last picture
        self._trace: dict[int, np.ndarray] = {}  # step → load (L, E)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if "routers" not in outputs:  # a dense model
            return
        self._micro_batches.append(outputs["routers"])
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0 or step == trainer.max_steps:  # type: ignore[attr-defined]
            self._latest = step, self._average(trainer)
            self._trace[step] = self._choices(trainer, self._latest[1])
            metrics = self.overall()
            # StepMetrics logs what training_step itself returns.
            log(trainer, {name: metrics[name] for name in metrics if name not in outputs})
            if self.picture_every is not None and step // self.picture_every > self._drawn // self.picture_every:
                self._draw(trainer)
        self._micro_batches.clear()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)
        if self._trace and trainer.is_global_zero:
            steps, loads = np.array(list(self._trace)), np.stack(list(self._trace.values()))
            np.savez_compressed(self.directory / TRACE, step=steps, block=np.array(self.blocks), load=loads)

    def overall(self) -> dict[str, float]:
        """Returns the values of the latest step that was logged; the run's last step always counts as one."""
        if self._latest is None:
            return {}
        return {f"router/{name}": value for name, value in router_health(self._latest[1]).items()}

    def _average(self, trainer: Trainer) -> RouterReport:
        """Averages the reports of a step's micro-batches over all processes, in fp64.

        The average of counts over all processes is proportional to their sum over data ranks, whether tensor ranks
        hold copies of the counts or each counts its own tokens.
        """
        reports = (report[:4] for report in self._micro_batches)
        own = [torch.stack(values).double().mean(0) for values in zip(*reports, strict=True)]
        joined = trainer.strategy.reduce(torch.cat([values.flatten() for values in own])).cpu()
        parts = joined.split([values.numel() for values in own])
        return RouterReport(*(part.view(values.shape) for part, values in zip(parts, own, strict=True)))

    def _choices(self, trainer: Trainer, average: RouterReport) -> np.ndarray:
        """Returns how many choices of the step fell on each expert: (L, E), int64."""
        degrees = trainer.strategy.topology.degrees  # type: ignore[attr-defined]
        own = routes_own_tokens(trainer.lightning_module)
        shares = degrees.world_size if own else degrees.data
        choices = average.load * (len(self._micro_batches) * shares)
        return choices.round().long().numpy()

    def _draw(self, trainer: Trainer) -> None:
        if self._latest is None or self._latest[0] == self._drawn or not trainer.is_global_zero:
            return
        self._drawn, routers = self._latest
        load_LE = relative_load(routers)
        data = {"step": self._drawn, "blocks": list(self.blocks), "relative_load": load_LE.tolist()}
        (self.directory / DATA).write_text(json.dumps(data) + "\n")
        draw_load(load_LE, self.blocks, self._drawn, self.directory / PICTURE)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("router/load", [str(self.directory / PICTURE)], step=self._drawn)
                logger.log_metrics({"router/load_map": load_chart(load_LE, self.blocks)}, step=self._drawn)


def draw_load(load_LE: Tensor, blocks: Sequence[int], step: int, file: Path) -> None:
    """Draws a heat map, layer × expert, of loads relative to their layer's mean.

    Args:
        load_LE: Relative loads, (L, E); see :func:`tedlab.moe.relative_load`.
        blocks: Indices of the L blocks, which label the rows.
        step: Number of the step, for the title.
        file: PNG file to write.
    """
    layers, experts = load_LE.shape
    size = min(12.0, 3.5 + 0.5 * experts), min(9.0, 1.9 + 0.45 * layers)  # inches
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.add_subplot()
    colour = TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, load_LE.max().item()))
    image = axes.imshow(load_LE.numpy(), cmap="RdBu_r", norm=colour, aspect="auto", interpolation="nearest")
    if load_LE.numel() <= _WRITTEN_CELLS:
        for (row, column), load in np.ndenumerate(load_LE.numpy()):
            dark = not 0.15 < colour(load) < 0.85
            axes.text(column, row, f"{load:.2f}", ha="center", va="center", c="white" if dark else "black", fontsize=8)
    axes.set_xticks(range(0, experts, -(-experts // 16)))
    rows = range(0, layers, -(-layers // 24))
    axes.set_yticks(rows, [str(blocks[row]) for row in rows])
    axes.set_xlabel("expert")
    axes.set_ylabel("block")
    axes.set_title(f"load of the experts at step {step}", loc="left", fontsize=10)
    figure.colorbar(image, ax=axes, label="load / mean", fraction=0.04, pad=0.02)
    figure.savefig(file)
