"""Checks and adapts the parts of Lightning that need care under TEDStrategy. docs/lightning.md lists all of them."""

import copy
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    ThroughputMonitor,
)
from lightning.pytorch.core import saving
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.tensor import Replicate
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from tedlab._compat.lightning import (
    detects_anomalies,
    given_checkpoint_io,
    set_average_model,
    synchronises_batch_norm,
)
from tedlab._compat.torch import IS_ANY_TRUE, BatchNorm
from tedlab.checkpoint import META

if TYPE_CHECKING:
    from tedlab.strategy.strategy import TEDStrategy

PRECISIONS = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")


def check(trainer: Trainer, strategy: "TEDStrategy", tensor_ranks: int) -> None:
    """Refuses, before the first step and on all processes, what would go wrong silently or late.

    Args:
        trainer: The trainer that is about to run.
        strategy: The trainer's strategy, with the model.
        tensor_ranks: T, the number of processes that are given the same batches.

    Raises:
        ValueError: If something does not work; the message says why, and what does work.
    """
    module = trainer.lightning_module
    for reason in (*_settings(trainer, strategy, module), *_callbacks(trainer, tensor_ranks), *_parameters(module)):
        raise ValueError(f"{reason} (docs/lightning.md)")


def prepare(trainer: Trainer) -> None:
    """Adapts callbacks and torch so that they work. The model must be built and on its device."""
    for callback in _callbacks_of(trainer):
        if isinstance(callback, StochasticWeightAveraging):
            # Its copy of the module dates from before ``configure_model`` made the layers, and would lack them.
            set_average_model(callback, copy.deepcopy(trainer.lightning_module))
        if isinstance(callback, BaseFinetuning):
            BaseFinetuning.filter_on_optimizer = staticmethod(_not_in_optimizer)  # type: ignore[method-assign]
    if detects_anomalies(trainer):
        _let_torch_look_for_nan()


def explain_directories() -> None:
    """Makes ``load_from_checkpoint``, which opens one file, explain how to load a checkpoint that is a directory."""
    load = saving.pl_load

    @functools.wraps(load)
    def load_or_explain(path: Any, *args: Any, **options: Any) -> Any:
        if isinstance(path, (str, Path)) and (Path(path) / META).exists():
            raise ValueError(
                f"{path} is a sharded checkpoint, a directory, which load_from_checkpoint cannot read since its layers "
                "need a Trainer's topology: give it as ckpt_path to trainer.fit, validate, test or predict, call "
                "tedlab.checkpoint.load_weights(self, path) in on_fit_start, or make one file of it with "
                "tedlab checkpoint consolidate (docs/lightning.md)"
            )
        return load(path, *args, **options)

    saving.pl_load = load_or_explain  # type: ignore[assignment]


def _settings(trainer: Trainer, strategy: "TEDStrategy", module: LightningModule) -> Iterator[str]:
    precision = strategy.precision_plugin
    known = type(precision) is Precision or isinstance(precision, (MixedPrecision, HalfPrecision, DoublePrecision))
    if precision.precision not in PRECISIONS or not known:
        yield (
            f"TEDStrategy does not support precision={precision.precision!r} of {type(precision).__name__} yet; "
            f"valid: {', '.join(PRECISIONS)}"
        )
    plugin = given_checkpoint_io(strategy)
    if plugin is not None:
        yield (
            f"The plugin {type(plugin).__name__} would not be used: TEDStrategy writes a directory "
            "through torch.distributed.checkpoint; leave it out (in the background: "
            "TEDStrategy(checkpoints=CheckpointOptions(async_save=True)))"
        )
    if strategy.comm.interleave and trainer.state.fn == TrainerFn.FITTING:
        if not module.automatic_optimization:
            yield "interleave=true needs automatic optimization, which knows the micro-batches of a step: use false"
        if trainer.accumulate_grad_batches < 2:
            yield (
                "interleave=true runs the backward pass of a micro-batch beside the forward pass of the next, but "
                f"accumulate_grad_batches is {trainer.accumulate_grad_batches}: use 2 or more, or interleave=false"
            )
        if is_overridden("backward", module, LightningModule):
            yield (
                f"interleave=true runs backward passes later and in another thread, where {type(module).__name__}."
                "backward would not be called: leave it out, or use interleave=false"
            )
    if synchronises_batch_norm(strategy) and any(isinstance(layer, BatchNorm) for layer in module.modules()):
        yield (
            "sync_batchnorm=True does not work under TEDStrategy: leave it out (each data rank then normalises with "
            "its own samples), or use LayerNorm, RMSNorm or GroupNorm"
        )


def _callbacks(trainer: Trainer, tensor_ranks: int) -> Iterator[str]:
    for callback in _callbacks_of(trainer):
        on_exception = isinstance(callback, ModelCheckpoint) and callback.save_on_exception
        if on_exception or isinstance(callback, OnExceptionCheckpoint):
            yield (
                f"{type(callback).__name__} would save when an exception is raised, but all processes write a "
                "checkpoint together, and those without the exception would be waited for in vain: save every n steps"
            )
        if isinstance(callback, ModelPruning):
            yield (
                "ModelPruning replaces parameters by masked ones in the middle of training, of which the sharded "
                "optimizer and its checkpoints know nothing: prune a consolidated model instead"
            )
        if isinstance(callback, ThroughputMonitor) and tensor_ranks > 1:
            yield (
                f"ThroughputMonitor counts the samples of every process, but the {tensor_ranks} processes of a tensor "
                f"group share theirs, so its totals would be {tensor_ranks} times too large: use "
                "tedlab.callbacks.StepMetrics"
            )


def _parameters(module: LightningModule) -> Iterator[str]:
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            yield (
                f"{name} has no shape before the first forward pass, and cannot be given to all processes: build the "
                "layer with its sizes, not lazily, or run a batch through it in configure_model"
            )
        elif parameter.is_complex():
            yield f"{name} is complex ({parameter.dtype}), which gradient buckets do not hold: use two real parameters"
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse:
            yield (
                f"{name} has sparse gradients (sparse=True), which cannot be reduced in flat buckets: use sparse=False"
            )


def _not_in_optimizer(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Replaces Lightning's, which compares values: it cannot compare sharded ones, and equal values mislead it."""
    known = {p for group in optimizer.param_groups for p in group["params"]}
    return [p for p in params if p not in known]


def _callbacks_of(trainer: Trainer) -> list[Any]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _let_torch_look_for_nan() -> None:
    """Teaches torch to test sharded gradients for NaN, which anomaly detection does with every gradient."""
    from torch.distributed.tensor.experimental import register_sharding  # a slow import, so only if needed

    @register_sharding(IS_ANY_TRUE)
    def whole(x: Any) -> list[tuple[list[Any], list[Any]]]:
        return [([Replicate()], [Replicate()])]
