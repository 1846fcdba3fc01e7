"""Training steps of a configuration, timed: the Trainer, strategy, optimizer and model of a real run."""

import gc
import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import hydra
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from torch import Tensor, nn
from typing_extensions import override

from tedlab.cli import CONF
from tedlab.config import TrainConfig
from tedlab.data import TextDataModule
from tedlab.nn import ShardedModule
from tedlab.predict.flops import peak_flops, training_flops
from tedlab.run import language_model, quieten, strategy_of
from tedlab.validate import complete_simulated

WARM_UP = 3  # untimed steps: they compile, and allocate what stays
_GIB = 2**30


@dataclass
class Measured:
    """Of steps after the warm-up.

    Attributes:
        seconds: of each.
        phases: median seconds of a step's parts.
        peak_bytes: most that was allocated.
        loss: of the last micro-batch.
    """

    seconds: list[float]
    phases: dict[str, float]
    peak_bytes: int
    loss: float

    def summary(self, config: TrainConfig, device: str) -> dict[str, Any]:
        """For a table and its JSON."""
        tokens, taken = config.data.batch_size * config.model.sequence_length, median(self.seconds)
        flops = tokens * training_flops(config.model, config.moe, config.optim.groups) / taken
        peak = peak_flops(device, str(config.trainer["precision"]))
        return {
            "step_s": taken,
            "tokens_per_second": tokens / taken,
            "tflops": flops / 1e12,
            "mfu": None if peak is None else flops / peak,
            "peak_gib": self.peak_bytes / _GIB,
            "phases_s": self.phases,
            "loss": self.loss,
            "steps_s": self.seconds,
        }


class Clock:
    """Marks on the device's own clock, so that nothing waits."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, Any]] = []

    def mark(self, ended: str) -> None:
        """Now a part of the step has ended."""
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((ended, event))
        else:
            self.marks.append((ended, time.perf_counter()))

    def measured(self, steps: int, peak_bytes: int, loss: float) -> Measured:
        """What the marks say of the last steps, each of which ends with ``step``."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends = [number for number, (name, _) in enumerate(self.marks) if name == "step"][-steps - 1 :]
        seconds, parts = [], []
        for begin, end in itertools.pairwise(ends):
            taken: defaultdict[str, float] = defaultdict(float)
            for (_, before), (name, after) in itertools.pairwise(self.marks[begin : end + 1]):
                taken["optimizer" if name == "step" else name] += _elapsed(before, after)
            parts.append(taken)
            seconds.append(sum(taken.values()))
        return Measured(seconds, {name: median(part[name] for part in parts) for name in parts[0]}, peak_bytes, loss)


def _elapsed(before: Any, after: Any) -> float:
    return after - before if isinstance(after, float) else before.elapsed_time(after) / 1e3


class StepClock(Callback):
    """The parts of Lightning's steps."""

    reads_grad = False

    def __init__(self) -> None:
        self.clock, self.loss = Clock(), torch.zeros(())

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP * trainer.accumulate_grad_batches and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.clock.mark("data")

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.clock.mark("forward")

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.mark("backward")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.loss = outputs["train/loss"]
        self.clock.mark("step" if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 else "optimizer")


class RandomTokens:
    """Token ids without end."""

    def __init__(self, config: TrainConfig) -> None:
        self.shape = config.data.micro_batch_size, config.model.sequence_length + 1
        self.vocabulary = config.model.vocab_size or 0

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        some = [torch.randint(self.vocabulary, self.shape, generator=generator) for _ in range(8)]
        return itertools.cycle([ids.pin_memory() for ids in some] if torch.cuda.is_available() else some)


def composed(overrides: list[str]) -> TrainConfig:
    """A complete configuration of one process."""
    return complete_simulated(incomplete(overrides))


def incomplete(overrides: list[str]) -> TrainConfig:
    """A configuration as ``tedlab plan`` begins with it."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", overrides=["output_dir=unused", "choices={}", "logger=none", *overrides])
    typed = OmegaConf.to_object(config)
    assert isinstance(typed, TrainConfig)
    return typed


def train(config: TrainConfig, steps: int, text: bool, *callbacks: Callback) -> Measured:
    """A short run.

    Args:
        config: of one process.
        steps: to be timed, after the warm-up.
        text: real text, as ``config.data`` says; otherwise random tokens.
        callbacks: further ones.
    """
    quieten()
    free()
    clock = StepClock()
    trainer = Trainer(
        **{**config.trainer, "max_steps": WARM_UP + steps},
        strategy=strategy_of(config),
        callbacks=[clock, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    data: Any = RandomTokens(config)
    if text:
        data = TextDataModule(config.data, config.model.sequence_length, config.seed)
        data.prepare_data()
    try:
        with patch("tedlab.models.gpt.initialize", drawn_there):
            trainer.fit(language_model(config), data)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return clock.clock.measured(steps, peak, clock.loss.item())
    finally:
        dist.destroy_process_group()


def drawn_there(root: nn.Module, seed: int, factors: Mapping[str, float]) -> None:
    """Initial weights drawn where they are: in another order than in training, but billions in no time."""
    torch.manual_seed(seed)  # the same in each process: replicas are equal
    for prefix, module in root.named_modules():
        if isinstance(module, ShardedModule):
            for name, spec in module.specs.items():
                values: Any = module.get_parameter(name).detach()
                values.to_local().normal_(spec.init.mean, spec.init.std * factors.get(f"{prefix}.{name}", 1.0))


def free() -> None:
    """Gives back what earlier models left behind, cycles included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
