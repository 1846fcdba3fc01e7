"""Checkpoints that callbacks and users of Lightning make and load: of step 0, of weights only, averaged, not strict."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn

from tedlab import checkpoint
from tests.lightning.training import Mixture, assert_same, fit, loader, mixture, trainer, weights
from tests.pool import WorkerPool


class Start(Callback):
    """What the optimizer has when training proper begins."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and trainer.current_epoch == 0:
            (optimizer,) = trainer.optimizers
            self.state = len(optimizer.state)
            self.rates = [group["lr"] for group in optimizer.param_groups]
            self.keys = sorted(optimizer.param_groups[0].keys())


class Weights(Callback):
    """Of every step, unsharded."""

    def __init__(self) -> None:
        self.history: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.history.append(weights(pl_module))


class Changing(Mixture):
    """Edits a checkpoint while it is loaded."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        state["outwards.bias"] = torch.full_like(state["outwards.bias"], 7.0)


class Larger(Mixture):
    """Has a parameter that the checkpoint lacks; its optimizer is another, too."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(3, 3)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), self.lr, eps=1e-5)


class Loose(Larger):
    strict_loading = False


class Data(LightningDataModule):
    pass


class FromWeights(Mixture):
    """Begins with a checkpoint's weights."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_fit_start(self) -> None:
        checkpoint.load_weights(self, self.path)


def attempt(function: Any, *args: Any, **options: Any) -> str:
    try:
        function(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def everything(folder: Path) -> dict[str, Any]:
    """All runs of this file, one after another in one world."""
    torch.set_default_dtype(torch.float64)  # averages are in the precision that plain layers are made in
    results: dict[str, Any] = {}
    # A learning-rate finder trains, and leaves nothing of it behind.
    for finder in ([], [LearningRateFinder(num_training_steps=3)]):
        module, start = mixture(), Start()
        fit(module, callbacks=[*finder, start], default_root_dir=folder)
        results["found" if finder else "not sought"] = (weights(module), start.state, start.rates, start.keys)
    # Averages of weights.
    module, history = mixture(), Weights()
    run = fit(module, callbacks=[history, EMAWeightAveraging(decay=0.9)], max_epochs=2)
    results["ema"] = (history.history, weights(module), run.callback_metrics["val"].item())
    module, history = mixture(), Weights()
    fit(module, callbacks=[history, WeightAveraging()])
    results["mean"] = (history.history, weights(module))
    module, history = mixture(), Weights()
    fit(module, callbacks=[history, StochasticWeightAveraging(0.005, swa_epoch_start=2)], max_epochs=4)
    results["swa"] = (history.history, weights(module))
    # Averaging that goes on from a checkpoint, in single and half precision.
    for precision in ("64-true", "bf16-true"):
        settings = {"precision": precision, "max_epochs": 2}
        whole = mixture()
        fit(whole, callbacks=[EMAWeightAveraging(decay=0.9)], **settings)
        path = folder / f"ema_{precision}.ckpt"
        first = mixture()
        saving = ModelCheckpoint(folder, path.stem, save_top_k=-1, enable_version_counter=False)
        fit(
            first,
            callbacks=[EMAWeightAveraging(decay=0.9), saving],
            **(settings | {"max_epochs": 1}),
            enable_checkpointing=True,
        )
        second = mixture(lr=0.3)
        fit(second, path, callbacks=[EMAWeightAveraging(decay=0.9)], **settings)
        results[f"ema resumed {precision}"] = (weights(second), weights(whole))
    # Weights only.
    module = mixture()
    run = fit(module)
    trained = weights(module)
    results["trained"] = trained
    light, complete = folder / "light.ckpt", folder / "complete.ckpt"
    run.save_checkpoint(light, weights_only=True)
    run.save_checkpoint(complete)
    results["val"] = run.validate(module, loader(), verbose=False)[0]["val"]
    other = trainer()
    results["light val"] = other.validate(mixture(), loader(), light, verbose=False)[0]["val"]
    results["light test"] = other.test(mixture(), loader(), light, verbose=False)[0]["test"]
    predictions = other.predict(mixture(), loader(), ckpt_path=light)
    results["light predict"] = torch.cat(predictions).square().mean()
    results["predict"] = torch.cat(run.predict(module, loader())).square().mean()
    results["light fit"] = attempt(fit, mixture(), light, max_epochs=2)
    module = FromWeights(light)
    fit(module, max_epochs=0)
    results["from weights"] = weights(module)
    results["load_from_checkpoint"] = [attempt(kind.load_from_checkpoint, light) for kind in (Mixture, Data)]
    # What a hook changes, and names that differ.
    module = Changing()
    trainer().validate(module, loader(), complete, verbose=False)
    results["changed"] = weights(module)
    results["strict"] = attempt(fit, Larger(), complete, max_epochs=2)
    module = Loose()
    fit(module, complete, max_epochs=1)
    results["loose"] = weights(module)
    loose_trained = Loose()
    fit(loose_trained, complete, max_epochs=2)
    resumed = mixture()
    fit(resumed, complete, max_epochs=2)
    results["loose trained"] = (weights(loose_trained), weights(resumed))
    # best and last
    saving = ModelCheckpoint(folder / "best", "{epoch}", monitor="val", save_last=True, enable_version_counter=False)
    module = mixture()
    run = fit(module, callbacks=[saving], max_epochs=2, enable_checkpointing=True)
    last = run.callback_metrics["val"].item()
    results["best"] = (
        run.validate(ckpt_path="best", dataloaders=loader(), verbose=False)[0]["val"],
        saving.best_model_score.item(),
    )
    results["last"] = (run.validate(ckpt_path="last", dataloaders=loader(), verbose=False)[0]["val"], last)
    again = mixture()
    run = fit(
        again,
        "last",
        callbacks=[ModelCheckpoint(folder / "best", save_last=True)],
        max_epochs=3,
        enable_checkpointing=True,
    )
    results["fit last"] = run.global_step
    results["hpc"] = attempt(fit, mixture(), "hpc", max_epochs=3, default_root_dir=folder)
    return results


@pytest.fixture(scope="module")
def alone(pool: WorkerPool, tmp_path_factory: Any) -> dict[str, Any]:
    return pool.run(1, everything, tmp_path_factory.mktemp("alone"))[0]


@pytest.fixture(scope="module")
def four(pool: WorkerPool, tmp_path_factory: Any) -> list[dict[str, Any]]:
    return pool.run(4, everything, tmp_path_factory.mktemp("four"))


@pytest.fixture(params=[pytest.param("alone", marks=pytest.mark.slow), pytest.param("four", marks=pytest.mark.slow)])
def world(request: Any) -> dict[str, Any]:
    """One process, and the first of four (tensor 2 × expert 2)."""
    results = request.getfixturevalue(request.param)
    return results[0] if isinstance(results, list) else results


def test_a_learning_rate_finder_leaves_nothing_of_its_training(world: Any) -> None:
    trained, *start = world["not sought"]
    found, *start_found = world["found"]
    assert start[:2] == [0, [0.01]]
    assert start_found == start
    assert_same(found, trained, rtol=0)


def test_an_exponential_moving_average_is_that_of_the_weights_of_each_step(world: Any) -> None:
    history, averaged, validated = world["ema"]
    expected = dict(history[0])
    for step in history[1:]:
        expected = {name: 0.9 * expected[name] + 0.1 * step[name] for name in expected}
    assert_same(averaged, expected)
    assert not torch.allclose(averaged["inwards.weight"], history[-1]["inwards.weight"], rtol=1e-3)
    assert validated > 0


def test_a_mean_of_weights_is_the_mean_of_each_step_s(world: Any) -> None:
    history, averaged = world["mean"]
    assert_same(averaged, {name: torch.stack([step[name] for step in history]).mean(0) for name in history[0]})


def test_stochastic_weight_averaging_is_the_mean_of_the_weights_at_the_end_of_epochs(world: Any) -> None:
    history, averaged = world["swa"]
    ends = [history[i] for i in (1, 3, 5)]  # it averages at the start of the second, third and fourth epoch
    assert_same(averaged, {name: torch.stack([step[name] for step in ends]).mean(0) for name in ends[0]})
    assert not torch.allclose(ends[0]["experts.experts.up"], ends[2]["experts.experts.up"])


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_averaging_goes_on_from_a_checkpoint_as_if_nothing_had_been(world: Any, precision: str) -> None:
    resumed, undisturbed = world[f"ema resumed {precision}"]
    assert_same(resumed, undisturbed, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ema", "mean", "swa", "trained", "changed", "loose", "from weights"])
def test_each_gives_in_four_processes_what_it_gives_in_one(alone: Any, four: Any, name: str) -> None:
    expected = alone[name]
    for rank in four:
        if isinstance(expected, tuple):
            assert_same(rank[name][1], expected[1], rtol=1e-7)
        else:
            assert_same(rank[name], expected)


@pytest.mark.slow
def test_weights_alone_can_be_validated_tested_and_predicted_with(alone: Any, four: Any) -> None:
    for rank in (alone, *four):
        assert rank["light val"] == rank["light test"] == rank["val"] == pytest.approx(alone["val"], rel=1e-12)
        assert torch.equal(rank["light predict"], rank["predict"])


def test_weights_alone_cannot_be_gone_on_from_and_the_refusal_says_how_to_start_with_them(world: Any) -> None:
    assert "holds weights only" in world["light fit"]
    assert "load_weights" in world["light fit"]
    assert_same(world["from weights"], world["trained"], rtol=0)


def test_load_from_checkpoint_says_what_to_do_with_a_directory(world: Any) -> None:
    for message in world["load_from_checkpoint"]:
        assert "load_weights(self, path) in on_fit_start" in message


def test_what_on_load_checkpoint_changes_arrives_in_the_model(world: Any) -> None:
    changed, trained = world["changed"], world["trained"]
    assert torch.all(changed["outwards.bias"] == 7)
    assert_same(changed | {"outwards.bias": trained["outwards.bias"]}, trained, rtol=0)


def test_a_parameter_that_a_checkpoint_lacks_is_named_unless_loading_is_not_strict(world: Any) -> None:
    assert "extra.weight: absent in the checkpoint" in world["strict"]
    loose = world["loose"]
    assert_same({name: loose[name] for name in world["trained"]}, world["trained"], rtol=0)
    assert loose["extra.weight"].abs().sum() > 0


def test_a_parameter_without_state_in_the_checkpoint_does_not_disturb_those_that_have(world: Any) -> None:
    loose, resumed = world["loose trained"]
    assert_same({name: loose[name] for name in resumed}, resumed, rtol=0)


def test_best_and_last_are_found(world: Any) -> None:
    best, score = world["best"]
    last, value = world["last"]
    assert best == pytest.approx(score, rel=1e-12)
    assert last == pytest.approx(value, rel=1e-12)
    assert world["fit last"] == 6
    assert "no HPC checkpoint was found" in world["hpc"]
