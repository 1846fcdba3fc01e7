"""What TEDStrategy refuses, on every process, before the first step, in a sentence that says what works."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    ThroughputMonitor,
)
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision, Precision
from lightning.pytorch.profilers import XLAProfiler
from torch import nn

from tedlab import TEDStrategy
from tedlab.config import CommOptions
from tests.lightning.side_by_side import Small, attempt, fit, run_cells
from tests.pool import WorkerPool


class Stepless(Small):
    """Fails, visibly, if it comes to a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("a step was taken")


class With(Stepless):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class Complex(Stepless):
    def __init__(self) -> None:
        super().__init__()
        self.rotation = nn.Parameter(torch.ones(2, dtype=torch.complex64))


class ByHand(Stepless):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class OwnBackward(Stepless):
    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        loss.backward()


def interleaved() -> TEDStrategy:
    return TEDStrategy(1, 2, comm=CommOptions(interleave=True))


class EightBit(Precision):
    """As the plugins of bitsandbytes and Transformer Engine, which cannot be made without their packages."""

    precision = "transformer-engine"


class Sharded(Stepless):
    def configure_sharded_model(self) -> None:
        pass


def exported(method: str, *args: Any) -> str:
    module = Small()
    fit(module, max_steps=0)
    return attempt(getattr(module, method), "exported", *args)


def with_optimizer(optimizer: Any) -> Any:
    module = Stepless()
    module.configure_optimizers = lambda: optimizer(module.parameters(), 0.1)  # type: ignore[method-assign]
    return module


def tried(module: Any = None, **options: Any) -> Any:
    return lambda: attempt(fit, (module or Stepless)(), **{k: v() for k, v in options.items()})


CELLS = {
    "precision": tried(precision=lambda: None, plugins=lambda: [EightBit()]),
    "transformer-engine": tried(precision=lambda: "transformer-engine"),
    "CheckpointIO": tried(plugins=lambda: [TorchCheckpointIO()]),
    "AsyncCheckpointIO": tried(plugins=lambda: [AsyncCheckpointIO()]),
    "sync_batchnorm": tried(lambda: With(nn.BatchNorm1d(3)), sync_batchnorm=lambda: True),
    "OnExceptionCheckpoint": tried(callbacks=lambda: [OnExceptionCheckpoint(".")], enable_checkpointing=lambda: True),
    "save_on_exception": tried(
        callbacks=lambda: [ModelCheckpoint(".", save_on_exception=True)], enable_checkpointing=lambda: True
    ),
    "ModelPruning": tried(callbacks=lambda: [ModelPruning("l1_unstructured", amount=0.5)]),
    "ThroughputMonitor": tried(callbacks=lambda: [ThroughputMonitor(lambda batch: len(batch[0]))]),
    "BatchSizeFinder": tried(callbacks=lambda: [BatchSizeFinder()]),
    "lazy": tried(lambda: With(nn.LazyLinear(3))),
    "complex": tried(Complex),
    "sparse": tried(lambda: With(nn.Embedding(4, 3, sparse=True))),
    "interleave, one micro-batch": tried(strategy=interleaved),
    "interleave, by hand": tried(ByHand, strategy=interleaved),
    "interleave, own backward": tried(OwnBackward, strategy=interleaved, accumulate_grad_batches=lambda: 2),
    "LBFGS": tried(lambda: with_optimizer(torch.optim.LBFGS)),
    "Muon": tried(lambda: with_optimizer(torch.optim.Muon)),
    "compiled module": tried(lambda: torch.compile(Stepless(), backend="eager")),
    "configure_sharded_model": tried(Sharded),
    "to_onnx": lambda: exported("to_onnx", torch.zeros(2, 3)),
    "to_tensorrt": lambda: exported("to_tensorrt", torch.zeros(2, 3)),
    "to_torchscript": lambda: exported("to_torchscript"),
    "XLAProfiler": lambda: attempt(XLAProfiler),
    "DeepSpeedPrecision": tried(precision=lambda: None, plugins=lambda: [DeepSpeedPrecision("32-true")]),
    "FSDPPrecision": tried(precision=lambda: None, plugins=lambda: [FSDPPrecision("32-true")]),
    "degrees": tried(strategy=lambda: TEDStrategy(3, 1)),
    "strategy": tried(strategy=lambda: "teds"),
    "accelerator": tried(accelerator=lambda: "tpus"),
}

SAID = {
    "precision": "valid: 32-true",
    "transformer-engine": "transformer_engine",
    "CheckpointIO": "TorchCheckpointIO would not be used",
    "AsyncCheckpointIO": "CheckpointOptions(async_save=True)",
    "sync_batchnorm": "use LayerNorm, RMSNorm or GroupNorm",
    "OnExceptionCheckpoint": "waited for in vain",
    "save_on_exception": "waited for in vain",
    "ModelPruning": "prune a consolidated model instead",
    "ThroughputMonitor": "2 times too large",
    "BatchSizeFinder": "not supported with distributed strategies",
    "lazy": "layer.weight has no shape before the first forward pass",
    "complex": "use two real parameters",
    "sparse": "layer has sparse gradients",
    "interleave, one micro-batch": "accumulate_grad_batches is 1: use 2 or more",
    "interleave, by hand": "needs automatic optimization",
    "interleave, own backward": "OwnBackward.backward would not be called",
    "LBFGS": "LBFGS",
    "Muon": "Muon",
    "compiled module": "compile",
    "configure_sharded_model": "configure_sharded_model",
    "to_onnx": "Error",
    "to_tensorrt": "Error",
    "to_torchscript": "Error",
    "XLAProfiler": "Error",
    "DeepSpeedPrecision": "DeepSpeedPrecision",
    "FSDPPrecision": "FSDPPrecision",
    "degrees": "world size 4",
    "strategy": "strategy",
    "accelerator": "accelerator",
}


def everything(folder: Path) -> dict[str, Any]:
    os.chdir(folder)
    return run_cells(CELLS)


@pytest.fixture(scope="module")
def four(pool: WorkerPool, tmp_path_factory: Any) -> list[dict[str, Any]]:
    return pool.run(4, everything, tmp_path_factory.mktemp("refused"))


@pytest.mark.parametrize("name", CELLS)
def test_it_is_refused_by_every_process_before_the_first_step(four: Any, name: str) -> None:
    for results in four:
        assert SAID[name] in results[name]
        assert "a step was taken" not in results[name]
        assert "no error" not in results[name]
