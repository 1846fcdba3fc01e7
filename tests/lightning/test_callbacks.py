"""Every callback that comes with Lightning: under TEDStrategy it does what it does under DDP."""

import json
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    DeviceStatsMonitor,
    EarlyStopping,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    SpikeDetection,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from tests.lightning.side_by_side import Small, assert_as_under_ddp, attempt, fit, loader, run_cells, trainer
from tests.lightning.test_arguments import Memory, broadcast
from tests.pool import WorkerPool


class Writer(BasePredictionWriter):
    """Keeps what it is to write."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.written: list[Any] = []

    def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, indices: Any, *_: Any) -> None:
        self.written.append((indices, prediction))

    def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, indices: Any) -> None:
        self.written.append((indices, predictions))


def predicted() -> Any:
    writer = Writer()
    trainer(callbacks=[writer]).predict(Small(), loader(), return_predictions=False)
    return writer.written


class Worsening(Small):
    """Its validation loss rises from the second on."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.current_epoch * (10 + batch[1].sum()), sync_dist=True, batch_size=len(batch[0]))


class Decaying(Small):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}]


def monitored(callback: Any, module: Small | None = None, **options: Any) -> Any:
    logger = Memory()
    result = fit(module, logger=logger, callbacks=[callback], log_every_n_steps=1, **options)
    names = {name for row in logger.rows if isinstance(row, tuple) for name in row[1]}
    return result, sorted(names) if dist.get_rank() == 0 else None


def rates() -> Any:
    logger = Memory()
    fit(Decaying(), logger=logger, callbacks=[LearningRateMonitor("step")], log_every_n_steps=1, max_epochs=2)
    return [row for row in logger.rows if "lr-AdamW" in row[1]] if dist.get_rank() == 0 else None


class Spiking(Small):
    """The loss of one data rank jumps."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        factor = 100.0 if self.global_step == 3 and 0 in self.trainer.train_dataloader.sampler else 1.0
        return super().loss(batch) * factor


def spiked() -> Any:
    file = Path(broadcast(tempfile.mkdtemp())) / "bad.json"
    spikes = SpikeDetection(warmup=1, rtol=None, atol=1.0, exclude_batches_path=str(file))
    error = attempt(fit, Spiking(), callbacks=[spikes], max_epochs=3)
    dist.barrier()
    return error, json.loads(file.read_text())


def saved() -> Any:
    folder = Path(broadcast(tempfile.mkdtemp()))
    saving = ModelCheckpoint(folder, "{epoch}-{step}", monitor="val", mode="max", save_top_k=2, save_last=True)
    result = fit(Worsening(), validate=True, callbacks=[saving], max_epochs=4, enable_checkpointing=True)
    dist.barrier()
    return result, sorted(path.name for path in folder.iterdir()), saving.best_model_score.item()


def logged_to_files() -> Any:
    folder = Path(broadcast(tempfile.mkdtemp()))
    fit(logger=CSVLogger(folder, "run", "0"), log_every_n_steps=1)
    dist.barrier()
    return sorted(path.name for path in folder.rglob("*")), (folder / "run/0/metrics.csv").read_text().count("\n")


CELLS = {
    "BasePredictionWriter": predicted,
    "EarlyStopping": lambda: fit(Worsening(), True, callbacks=[EarlyStopping("val", patience=1)], max_epochs=6),
    "Timer": lambda: fit(callbacks=[Timer(timedelta(0))], max_epochs=3),
    "LambdaCallback": lambda: fit(callbacks=[LambdaCallback(on_train_start=lambda _, m: m.calls.append("started"))]),
    "LearningRateMonitor": rates,
    "DeviceStatsMonitor": lambda: monitored(DeviceStatsMonitor(cpu_stats=False)),
    "ModelCheckpoint": saved,
    "ModelSummary": lambda: fit(callbacks=[ModelSummary(max_depth=2)], enable_model_summary=True),
    "RichModelSummary": lambda: fit(callbacks=[RichModelSummary()], enable_model_summary=True),
    "RichProgressBar": lambda: fit(callbacks=[RichProgressBar()], enable_progress_bar=True),
    "TQDMProgressBar": lambda: fit(callbacks=[TQDMProgressBar()], enable_progress_bar=True),
    "SpikeDetection": spiked,
    "CSVLogger": logged_to_files,
}


def everything() -> dict[str, Any]:
    return run_cells(CELLS)


@pytest.fixture(scope="module")
def ddp(pool: WorkerPool) -> list[dict[str, Any]]:
    return pool.run(2, everything)


@pytest.fixture(scope="module")
def ted(pool: WorkerPool) -> list[dict[str, Any]]:
    return pool.run(4, everything)


@pytest.mark.parametrize("name", CELLS)
def test_a_callback_does_what_it_does_under_ddp(ddp: Any, ted: Any, name: str) -> None:
    assert_as_under_ddp(ted, ddp, name)
