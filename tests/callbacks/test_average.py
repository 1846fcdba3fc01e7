"""Averages of weights through Lightning's callback: what is validated, saved, gone on from and exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader

from tedlab._compat.lightning import averaged_model
from tedlab.callbacks import AverageWeights
from tedlab.checkpoint import read_meta
from tedlab.config import AverageConfig, AverageKind
from tests.pool import WorkerPool
from tests.training import Job, Layout, full, language_model, loader, silent_trainer, trainer

LAYOUT, STEPS, START, EVERY, DECAY = Layout(2, expert=2), 10, 2, 2, 0.7

pytestmark = pytest.mark.slow  # its runs take longest


class Seen(Callback):
    """Collects the weights after each step, and those that validations use; saves a checkpoint after a step."""

    def __init__(self, path: Path | None, step: int) -> None:
        self.path, self.step = path, step
        self.trained: dict[int, dict[str, Tensor]] = {}
        self.validated: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step not in self.trained and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.trained[trainer.global_step] = weights(pl_module)
            if self.path is not None and trainer.global_step == self.step:
                trainer.save_checkpoint(self.path)
            if self.path is not None and trainer.global_step == 1:
                trainer.save_checkpoint(self.path.with_name(f"{self.path.name}_early"))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.validated[trainer.global_step] = weights(pl_module)


def weights(module: LightningModule) -> dict[str, Tensor]:
    return {name: full(p) for name, p in module.named_parameters()}


def run(
    kind: str | None, precision: str = "64-true", save: Path | None = None, resume: Path | None = None, step: int = 8
) -> dict[str, Any]:
    job = Job(precision=precision, lr=0.05)
    seen, module = Seen(save, step), language_model(job)
    averaging = [] if kind is None else [AverageWeights(AverageConfig(kind, DECAY, EVERY, START))]
    fit = trainer(
        LAYOUT,
        job,
        callbacks=[*averaging, seen],
        max_steps=STEPS,
        accumulate_grad_batches=job.micro_batches // LAYOUT.data,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        limit_val_batches=1,
    )
    data = loader(LAYOUT, job, fit.global_rank)
    fit.fit(module, data, data, ckpt_path=resume)
    averages = {name: full(p) for name, p in averaging[0].averages().items()} if averaging else {}
    found = {"trained": seen.trained, "validated": seen.validated, "after": weights(module), "averages": averages}
    if save is not None:
        fit.save_checkpoint(save.with_name(f"{save.name}_last"))
        other = language_model(job)
        fit = trainer(LAYOUT, job, limit_val_batches=1)
        fit.validate(other, data, save.with_name(f"{save.name}_last"), verbose=False)
        found["evaluated"] = weights(other)
    return found


def all_runs(folder: Path) -> dict[str, Any]:
    found = {}
    for kind, precision in (("ema", "64-true"), ("mean", "64-true"), ("ema", "bf16-true")):
        name = f"{kind} {precision}"
        path = folder / name.replace(" ", "_")
        found[name] = run(kind, precision, save=path)
        if kind == "ema":
            found[f"{name} resumed"] = run(kind, precision, resume=path)
    found["without"] = run(None, resume=folder / "ema_64-true")
    return found


@pytest.fixture(scope="module")
def runs(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("average")
    return {**pool.run(2, all_runs, folder)[0], "folder": folder}


def by_hand(trained: dict[int, dict[str, Tensor]], kind: str, until: int) -> dict[str, Tensor]:
    """The average after a step, in the widest precision."""
    counted = [trained[step] for step in range(1, until + 1) if step - 1 >= START and (step - 1 - START) % EVERY == 0]
    found = {name: value.double() for name, value in counted[0].items()}
    for n, weights_ in enumerate(counted[1:], 2):
        share = 1 / n if kind == "mean" else 1 - DECAY
        found = {name: (1 - share) * value + share * weights_[name].double() for name, value in found.items()}
    return found


@pytest.mark.parametrize("kind", ["ema", "mean"])
def test_the_average_is_that_of_the_steps_that_count_and_is_validated(runs: dict[str, Any], kind: str) -> None:
    found = runs[f"{kind} 64-true"]
    for step in (4, 8, 10):
        for name, value in by_hand(found["trained"], kind, step).items():
            torch.testing.assert_close(found["validated"][step][name], value, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(found["validated"][2][name], value) for name, value in found["trained"][2].items())
    assert all(torch.equal(found["after"][name], value) for name, value in found["trained"][STEPS].items())
    for name, value in by_hand(found["trained"], kind, STEPS).items():
        torch.testing.assert_close(found["evaluated"][name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["ema 64-true", "ema bf16-true"])
def test_a_resumed_run_goes_on_with_weights_and_average_to_the_last_bit(runs: dict[str, Any], name: str) -> None:
    for what in ("after", "averages"):
        whole, resumed = runs[name][what], runs[f"{name} resumed"][what]
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_averages_of_half_precision_weights_are_in_fp32_through_validations(runs: dict[str, Any]) -> None:
    found = runs["ema bf16-true"]
    assert {value.dtype for value in found["trained"][1].values()} == {torch.bfloat16}
    assert {value.dtype for value in found["averages"].values()} == {torch.float32}
    for name, value in by_hand(found["trained"], "ema", STEPS).items():
        torch.testing.assert_close(found["averages"][name].double(), value, rtol=1e-6, atol=1e-7)


def test_a_run_that_does_not_average_goes_on_with_the_weights_that_were_trained(runs: dict[str, Any]) -> None:
    assert all(torch.equal(runs["without"]["after"][n], value) for n, value in runs["ema 64-true"]["after"].items())


def test_a_checkpoint_before_the_first_average_holds_the_model_as_it_is(runs: dict[str, Any]) -> None:
    assert "current_model_state" not in read_meta(runs["folder"] / "ema_64-true_early")
    assert read_meta(runs["folder"] / "ema_64-true")["average"]["kind"] == "ema"


class Tied(LightningModule):
    """Two names for one matrix, and buffers of both kinds that change with each step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("number", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.mean += batch.mean()
        self.number += 1
        return self.second(self.first(batch.to(self.mean.dtype))).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class AsTorch(Callback):
    """The same average by torch's own class."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = get_ema_avg_fn(DECAY)
        self.model = AveragedModel(pl_module, avg_fn=lambda a, w, n: average(a, w, n) if a.is_floating_point() else w)
        self.model.use_buffers = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.model.update_parameters(pl_module)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_buffers_are_averaged_and_tied_weights_stay_tied_in_every_fit(precision: str) -> None:
    module, data = Tied(), [torch.full((2, 4), float(n)) for n in range(1, 5)]
    for fit in range(2):  # by the second, the module has the precision of the first
        averaging, expected = AverageWeights(AverageConfig(AverageKind.EMA, DECAY, 1, 0)), AsTorch()
        options = {"precision": precision, "callbacks": [averaging, expected], "max_epochs": None, "max_steps": 4}
        silent_trainer("auto", 1, **options).fit(module, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
        model = averaged_model(averaging)
        assert model is not None
        assert model.module.second.weight is model.module.first.weight
        averages, theirs = model.module.state_dict(), expected.model.module.state_dict()
        if precision == "64-true":  # torch averages halves in halves
            torch.testing.assert_close(averages, theirs, rtol=1e-14, atol=1e-14)
        assert averages["first.weight"].dtype == (torch.float64 if precision == "64-true" else torch.float32)
        assert averages["number"] == 4 * (fit + 1)


class FailsInValidation(Callback):
    """Keeps the weights of the last step, and those that a validation begins with, which then fails."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.trained = weights(pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.validated = weights(pl_module)
        raise ValueError("this validation fails")


def test_a_validation_that_fails_leaves_the_weights_that_were_trained() -> None:
    module, data, seen = Tied(), [torch.full((2, 4), float(n)) for n in range(1, 4)], FailsInValidation()
    module.validation_step = module.training_step  # type: ignore[method-assign]
    callbacks = [AverageWeights(AverageConfig(AverageKind.EMA, DECAY, 1, 0)), seen]
    loader = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="this validation fails"):
        silent_trainer("auto", 1, callbacks=callbacks, num_sanity_val_steps=0).fit(module, loader, loader)
    assert not torch.equal(seen.validated["first.weight"], seen.trained["first.weight"])
    assert torch.equal(module.first.weight, seen.trained["first.weight"])
