"""Averages the weights of a run's steps, with Lightning's callback (``average``)."""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from tedlab._compat.lightning import averaged_model
from tedlab.config import AverageConfig, AverageKind
from tedlab.optim.bucket import like, local

_WIDE = "averages"  # the checkpoint's key of averages that are wider than the weights


class AverageWeights(WeightAveraging):
    """Keeps an average of the weights, which validation uses, and which checkpoints hold as the model.

    Each process averages its parts of parameters and buffers, which needs no communication, as plain tensors: for each
    new shape, a DTensor searches all shardings that an operation could have, which takes long on a mesh of many
    dimensions. Checkpoints also hold the weights of the last step, with which training goes on. This differs from
    Lightning's class where that would go wrong here: averages of half precision are in fp32, also after a validation;
    before the first weights count, validation and checkpoints use the current ones; and training ends with the current
    weights, so that a checkpoint saved afterwards has both.

    Args:
        config: What is averaged.
    """

    def __init__(self, config: AverageConfig) -> None:
        self.config = config
        super().__init__()
        self._current: list[Tensor] = []  # weights and buffers of the last step, while averages take their place

    @override
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is None or step_idx < self.config.start:
            return False
        return (step_idx - self.config.start) % self.config.every == 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*WeightAveraging doesn't support sharding.*")
            super().setup(trainer, pl_module, stage)
        wide = precision_of_averages(trainer.precision)
        model = averaged_model(self)
        if model is None:
            return
        model.update_parameters = partial(self._count, model)  # type: ignore[method-assign]
        wider: dict[int, Tensor] = {}  # by the identity of what it replaces: tied weights stay tied
        for layer in model.module.modules():
            for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
                if tensor.is_floating_point() and tensor.dtype != wide:
                    if id(tensor) not in wider:
                        values = like(tensor, local(tensor).to(wide))
                        wider[id(tensor)] = nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values
                    setattr(layer, name, wider[id(tensor)])

    @torch.no_grad()
    def _count(self, model: AveragedModel, module: nn.Module) -> None:
        """Counts the current weights, as ``AveragedModel.update_parameters`` does."""
        before = int(model.n_averaged)
        for average, weight in zip(_parts(model.module), _parts(module), strict=True):
            average.copy_(averaged(self.config, average, weight, before) if before else weight)
        model.n_averaged += 1

    def averages(self) -> dict[str, Tensor]:
        """Returns the averages of parameters by name, sharded like these; none before the first weights count."""
        model = averaged_model(self)
        return {} if model is None or not model.n_averaged else dict(model.module.named_parameters())

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the module its current weights."""

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.averages():
            self._current = [part.clone() for part in _parts(pl_module)]
            _copy(self._averages(), _parts(pl_module))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the averages in place, for others that evaluate now."""

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._current:
            _copy(self._current, _parts(pl_module))
            self._current = []

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the module its current weights back if a validation was cut short."""
        self.on_validation_end(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = asdict(self.config)
        averages = self.averages()
        if not averages:
            return
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if any(p.dtype != averages[name].dtype for name, p in pl_module.named_parameters()):
            checkpoint[_WIDE] = averages

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        model = averaged_model(self)
        if model is None or "averaging_state" not in checkpoint:
            return
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if _WIDE in checkpoint:
            model.module.load_state_dict(checkpoint[_WIDE], strict=False)

    def _averages(self) -> Iterator[Tensor]:
        model = averaged_model(self)
        return iter(()) if model is None else _parts(model.module)


def averaged(config: AverageConfig, average: Tensor, weight: Tensor, before: int) -> Tensor:
    """Returns the average, in place, with one more weight; it has counted some before. Of integers, it is the last."""
    if not average.is_floating_point():
        return weight
    share = 1 - config.decay if config.kind == AverageKind.EMA else 1 / (before + 1)
    return average.lerp_(weight.to(average.dtype), share)


def precision_of_averages(precision: str | None) -> torch.dtype:
    """Returns the dtype of averages for a value of ``trainer.precision``."""
    return torch.float64 if precision == "64-true" else torch.float32


def _parts(module: nn.Module) -> Iterator[Tensor]:
    """Yields this process's parts of parameters and buffers, which share their memory."""
    return map(local, itertools.chain(module.parameters(), module.buffers()))


@torch.no_grad()
def _copy(values: Any, tensors: Iterator[Tensor]) -> None:
    for value, tensor in zip(values, tensors, strict=True):
        tensor.copy_(value)
