"""Logs losses and throughput of training steps, with one collective per logged step to average over data ranks."""

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from tedlab.callbacks.journal import log
from tedlab.module import NOT_SCALARS
from tedlab.predict.flops import peak_flops
from tedlab.strategy import TEDStrategy


class StepMetrics(Callback):
    """Logs the scalars that ``training_step`` returns, and learning rate, step time, tokens/s, TFLOP/s and MFU.

    ``perf/tflops`` counts model FLOPs per device (on CPU: per process), see ``flops.py``; ``perf/mfu`` is its share of
    the device's peak, where that is known. With clipping, the gradient norm before clipping is logged too; with fp16,
    the loss scale and the number of skipped steps.

    Scalars are means over a step's micro-batches and data ranks. Between two logged steps nothing is reduced and no
    value is read from the device. Step time excludes validation.

    Args:
        read: Returns the number of tokens that the steps from one up to, without, another read over all data ranks.
        flops: Returns the model FLOPs of their forward and backward passes.
    """

    def __init__(self, read: Callable[[int, int], int], flops: Callable[[int, int], int]) -> None:
        self.read, self.flops = read, flops
        self._devices = 1
        self._peak: float | None = None  # FLOP/s of one device
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0
        self._marks: list[tuple[int, float]] = []  # step and training seconds, at the start and at each logging
        self._validation_began = 0.0
        self._validating = 0.0  # seconds spent in validation

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._devices = trainer.world_size
        device = trainer.strategy.root_device
        if device.type == "cuda":
            self._peak = peak_flops(torch.cuda.get_device_name(device), trainer.precision)
        self._mark(trainer.global_step)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_began = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validating += time.perf_counter() - self._validation_began

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, value in outputs.items():
            if name not in NOT_SCALARS:
                self._sums[name] = self._sums.get(name, 0.0) + value
        self._micro_batches += 1
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._mark(trainer.global_step)
            precise = torch.promote_types(self._sums["train/loss"].dtype, torch.float32)
            values = torch.stack([value.to(precise) for value in self._sums.values()]) / self._micro_batches
            metrics = dict(zip(self._sums, trainer.strategy.reduce(values).tolist(), strict=True))
            metrics["train/learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
            log(trainer, metrics | _of_optimizer(trainer) | self._throughput(-2))
        self._sums.clear()
        self._micro_batches = 0

    def overall(self) -> dict[str, float]:
        """Returns mean throughput after the first logged step (warm-up), or of the whole run if that was the last."""
        return self._throughput(1 if len(self._marks) > 2 else 0)

    def _mark(self, step: int) -> None:
        self._marks.append((step, time.perf_counter() - self._validating))

    def _throughput(self, since: int) -> dict[str, float]:
        if not self._marks:  # resumed where it ends: nothing was trained
            return {}
        (first, began), (last, ended) = self._marks[since], self._marks[-1]
        if last == first:
            return {}
        flops = self.flops(first, last) / (ended - began) / self._devices
        return {
            "perf/tokens_per_second": self.read(first, last) / (ended - began),
            "perf/step_time_s": (ended - began) / (last - first),
            "perf/tflops": flops / 1e12,
            **({} if self._peak is None else {"perf/mfu": flops / self._peak}),
        }


def _of_optimizer(trainer: Trainer) -> dict[str, float]:
    strategy = trainer.strategy
    assert isinstance(strategy, TEDStrategy)
    metrics = {}
    norm = strategy.sharded_optimizers[0].last_norm
    if norm is not None:
        metrics["train/gradient_norm"] = norm
    if strategy.loss_scaler is not None:
        metrics["train/loss_scale"] = strategy.loss_scaler.scale
        metrics["train/skipped_steps"] = float(strategy.loss_scaler.skipped_steps)
    return metrics
