"""Every argument of Lightning's Trainer: under TEDStrategy a run does what it does under DDP."""

import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, PyTorchProfiler, SimpleProfiler

from tests.lightning.side_by_side import DATA, Small, assert_equal, fit, loader, outcome, run_cells, trainer
from tests.pool import WorkerPool

pytestmark = pytest.mark.slow  # worlds of four processes that train for each of many cases


class Memory(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []

    name, version = "memory", "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))

    def log_hyperparams(self, params: Any, *_: Any) -> None:
        self.rows.append(dict(params))


class Modes(Small):
    """Notes in which mode a validation runs."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.calls.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), self.training))


class Loaders(Small):
    """Makes its own loaders."""

    def train_dataloader(self) -> Any:
        self.calls.append("loader")
        return loader()


class Named(Small):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()


def logged(**options: Any) -> Any:
    logger = Memory()
    result = fit(Named(), logger=logger, **options)
    return result | {"rows": logger.rows if dist.get_rank() == 0 else None}


def profiled(profiler: Any) -> Any:
    result = fit(profiler=profiler)
    actions = getattr(profiler, "recorded_durations", None) or getattr(profiler, "profiled_actions", {})
    return result | {
        "stepped": any("training_step" in name for name in actions) or isinstance(profiler, PyTorchProfiler)
    }


def evaluated() -> Any:
    module, run = Small(), trainer(limit_val_batches=1, limit_test_batches=0.5, limit_predict_batches=1)
    values = [run.validate(module, loader(), verbose=False), run.test(module, loader(), verbose=False)]
    return values, torch.cat(run.predict(module, loader()))


def checkpointed(**options: Any) -> Any:
    folder = Path(broadcast(tempfile.mkdtemp()))
    module, run = Small(), trainer(default_root_dir=folder, enable_checkpointing=True, **options)
    run.fit(module, loader())
    path = Path(run.checkpoint_callback.best_model_path)
    return outcome(run, module) | {"checkpoint": str(path.relative_to(folder)), "there": path.exists()}


def broadcast(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def summarised() -> Any:
    module = Small()
    run = trainer(callbacks=[Summary()], enable_model_summary=True)
    run.fit(module, loader())
    return module.calls


class Summary(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        from lightning.pytorch.utilities.model_summary import summarize

        summary = summarize(pl_module, max_depth=3)
        pl_module.calls.append((summary.total_parameters, summary.trainable_parameters))


def with_own_sampler() -> Any:
    module, run = Small(), trainer(use_distributed_sampler=False)
    sampler = torch.utils.data.SequentialSampler(DATA)
    run.fit(module, loader(sampler=sampler))
    return outcome(run, module)


def shuffled() -> Any:
    from lightning.pytorch import seed_everything

    seed_everything(3, verbose=False)
    module, run = Small(), trainer(max_epochs=2)
    run.fit(module, loader(shuffle=True))
    return outcome(run, module)


CELLS = {
    "shuffle": shuffled,
    "accumulate_grad_batches": lambda: fit(accumulate_grad_batches=2),
    "GradientAccumulationScheduler": lambda: fit(callbacks=[GradientAccumulationScheduler({0: 1, 1: 2})], max_epochs=2),
    "gradient_clip_val": lambda: fit(gradient_clip_val=0.1, gradient_clip_algorithm="norm"),
    "max_steps": lambda: fit(max_epochs=-1, max_steps=3),
    "min_steps": lambda: fit(max_epochs=3, min_steps=3, max_time=timedelta(0)),
    "min_epochs": lambda: fit(max_epochs=3, min_epochs=2, max_time=timedelta(0)),
    "limit_train_batches": lambda: fit(limit_train_batches=1),
    "limit_evaluation": evaluated,
    "overfit_batches": lambda: fit(overfit_batches=1, max_epochs=2, validate=True),
    "fast_dev_run": lambda: fit(fast_dev_run=True, validate=True),
    "val_check_interval": lambda: fit(val_check_interval=1, validate=True),
    "val_check_interval of an epoch": lambda: fit(val_check_interval=0.5, validate=True),
    "check_val_every_n_epoch": lambda: fit(check_val_every_n_epoch=2, max_epochs=3, validate=True),
    "val_check_interval of steps": lambda: fit(
        val_check_interval=3, check_val_every_n_epoch=None, max_epochs=3, validate=True
    ),
    "num_sanity_val_steps": lambda: fit(num_sanity_val_steps=1, validate=True),
    "log_every_n_steps": lambda: logged(log_every_n_steps=1, max_epochs=2),
    "enable_autolog_hparams": lambda: logged(enable_autolog_hparams=False),
    "enable_checkpointing": checkpointed,
    "default_root_dir": lambda: checkpointed(max_epochs=2),
    "enable_progress_bar": lambda: fit(enable_progress_bar=True),
    "enable_model_summary": summarised,
    "deterministic": lambda: fit(deterministic=True, benchmark=False),
    "inference_mode": lambda: fit(Modes(), validate=True),
    "no inference_mode": lambda: fit(Modes(), inference_mode=False, validate=True),
    "use_distributed_sampler": with_own_sampler,
    "profiler": lambda: [profiled(SimpleProfiler()), profiled(AdvancedProfiler()), profiled(PassThroughProfiler())],
    "PyTorchProfiler": lambda: profiled(PyTorchProfiler(dirpath=tempfile.mkdtemp())),
    "detect_anomaly": lambda: fit(detect_anomaly=True),
    "barebones": lambda: fit(
        barebones=True,
        enable_progress_bar=None,
        logger=None,
        enable_checkpointing=None,
        enable_model_summary=None,
        num_sanity_val_steps=None,
    ),
    "reload_dataloaders_every_n_epochs": lambda: fit_own(reload_dataloaders_every_n_epochs=1, max_epochs=2),
    "model_registry": lambda: fit(model_registry="owner/model"),
    "plugins": lambda: fit(precision=None, plugins=[DoublePrecision()]),
}


def fit_own(**options: Any) -> Any:
    module, run = Loaders(), trainer(**options)
    run.fit(module)
    return outcome(run, module)


def everything() -> dict[str, Any]:
    return run_cells(CELLS)


@pytest.fixture(scope="module")
def ddp(pool: WorkerPool) -> list[dict[str, Any]]:
    return pool.run(2, everything)


@pytest.fixture(scope="module")
def ted(pool: WorkerPool) -> list[dict[str, Any]]:
    return pool.run(4, everything)


@pytest.mark.parametrize("name", CELLS)
def test_an_argument_does_what_it_does_under_ddp(ddp: Any, ted: Any, name: str) -> None:
    for rank, results in enumerate(ted):
        expected = ddp[rank // 2][name]
        assert not isinstance(expected, str), expected
        assert not isinstance(results[name], str), results[name]
        if rank in (0, 3):  # process 0 and one that has neither its tensor nor its data rank
            assert_equal(results[name], expected, name)
