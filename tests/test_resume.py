"""A run that goes on takes over what its checkpoint decides, obeys what is named, and says both."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tedlab.checkpoint import META
from tedlab.config import DataConfig, ModelConfig, MoEConfig, OptimConfig, TrainConfig
from tedlab.data import TextDataModule
from tedlab.errors import UsageError
from tedlab.module import LanguageModel
from tedlab.report import branch_of, note_branch, resolved_yaml
from tedlab.resume import find_checkpoint, named_values, resume, take_over
from tests.pool import WorkerPool
from tests.test_conf import compose
from tests.training import Layout, full, trainer

SAVED, STEPS, TOTAL = 3, 6, 10
LENGTH, BATCH = 12, 8


# ---- what is named --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_hydra_left_behind() -> Iterator[None]:
    yield
    HydraConfig.instance().cfg = None


def named(*overrides: str) -> set[str]:
    compose(*overrides)
    return named_values(HydraConfig.get())


def test_values_of_the_command_line_are_named_and_of_presets_those_that_say_how_to_train() -> None:
    found = named("optim=sgd", "+optim.optimizer.nesterov=true", "trainer=gpu", "trainer.max_steps=7", "data=stdlib")
    assert {"optim", "optim.optimizer.nesterov", "trainer.max_steps"} <= found
    assert not {"trainer", "data"} & found


def test_an_experiment_names_the_values_and_presets_of_its_file() -> None:
    found = named("experiment=gpu/olmoe_1b_7b")
    assert {"optim.lr", "data.batch_size", "moe", "model.loss_chunk"} <= found
    assert "optim" not in found


# ---- what is taken over ---------------------------------------------------------------------------------------------


def saved(config: TrainConfig, **trainer: Any) -> dict[str, Any]:
    """What the checkpoint of a run of ``config`` says of it."""
    return {
        "global_step": 5,
        "hyper_parameters": {
            "model": asdict(config.model),
            "moe": asdict(config.moe),
            "optim": asdict(config.optim),
            "seed": config.seed,
        },
        "trainer": {"max_steps": 500, "gradient_clip_val": 1.0, **trainer},
        "TextDataModule": {
            "batch_size": config.data.batch_size,
            "ramp": [asdict(stage) for stage in config.data.ramp],
        },
    }


def test_what_is_not_named_stays_as_in_the_checkpoint() -> None:
    before = compose("optim.lr=0.02", "moe=top2", "optim.optimizer.weight_decay=0.3", "data.batch_size=32", "seed=4")
    config = compose("parallel=ep4")
    config, said = take_over(config, saved(before, max_steps=900, gradient_clip_val=0.5), {"parallel"})
    assert config.optim == before.optim
    assert config.moe == before.moe
    assert (config.data.batch_size, config.seed) == (32, 4)
    assert (config.trainer["max_steps"], config.trainer["gradient_clip_val"]) == (900, 0.5)
    assert config.parallel.expert == 4
    (kept,) = said
    assert kept.startswith("As in the checkpoint, since not named here: optim.lr=0.02 (not 0.004), ")
    assert "optim.optimizer.weight_decay=0.3 (not 0.1)" in kept
    assert "moe.top_k=2 (not 1)" in kept


def test_what_is_named_is_applied_and_said() -> None:
    before = compose("optim.lr=0.02", "optim.schedule=constant")
    overrides = ["optim.lr=1e-4", "optim.optimizer.betas=[0.8,0.9]", "trainer.gradient_clip_val=0.1"]
    config = compose(*overrides)
    config, said = take_over(config, saved(before), named(*overrides))
    assert config.optim.lr == 1e-4
    assert config.optim.schedule == "constant"
    assert config.optim.optimizer["betas"] == [0.8, 0.9]
    assert config.trainer["gradient_clip_val"] == 0.1
    assert said[0] == (
        "Other than so far: optim.lr=0.0001 (so far 0.02), optim.optimizer.betas=[0.8,0.9] (so far [0.9,0.95]), "
        "trainer.gradient_clip_val=0.1 (so far 1.0)."
    )
    assert said[1] == "As in the checkpoint, since not named here: optim.schedule=constant (not cosine)."


def test_stages_stay_as_in_the_checkpoint_unless_they_are_named() -> None:
    ramp = "data.ramp=[{until: 9, batch_size: 8}]"
    config, (said,) = take_over(compose(), saved(compose(ramp)), set())
    assert config.data.ramp == compose(ramp).data.ramp
    assert "data.ramp=[{until:9,batch_size:8}] (not [])" in said
    config, _ = take_over(compose("data.ramp=[]"), saved(compose(ramp)), named("data.ramp=[]"))
    assert config.data.ramp == []


def test_the_same_command_line_again_changes_nothing() -> None:
    overrides = ["optim=sgd", "optim.lr=0.3", "moe=top2", "seed=3"]
    before = compose(*overrides)
    assert take_over(before, saved(before), named(*overrides)) == (before, [])


def test_another_optimizer_and_another_loss_scale_are_refused() -> None:
    with pytest.raises(ValueError, match=r"state of torch\.optim\.AdamW; add optim\.optimizer\._target_=torch"):
        take_over(compose("optim=sgd"), saved(compose()), named("optim=sgd"))
    scale = ["optim.loss_scale=8"]
    with pytest.raises(ValueError, match=r"optim\.loss_scale=8\.0 is where a run begins"):
        take_over(compose(*scale), saved(compose()), named(*scale))


FROZEN = "optim.groups=[{pattern: '*.router.*', frozen: true}, {pattern: '*.experts.*', lr: 0.01}]"


def test_groups_stay_as_in_the_checkpoint_and_their_rates_may_change() -> None:
    config, (said,) = take_over(compose(), saved(compose(FROZEN)), set())
    assert config.optim.groups == compose(FROZEN).optim.groups
    assert "optim.groups=[{pattern:*.router.*,frozen:true},{pattern:*.experts.*,lr:0.01}] (not [])" in said
    slower = FROZEN.replace("0.01", "0.001")
    config, _ = take_over(compose(slower), saved(compose(FROZEN)), named(slower))
    assert config.optim.groups[1].lr == 0.001


def test_a_run_that_goes_on_trains_the_same_parameters_together() -> None:
    for before, now in ((FROZEN, FROZEN.replace(", frozen: true", "")), ("optim.groups=[]", FROZEN)):
        with pytest.raises(ValueError, match=r"optim\.groups=.*trains other parameters together.*not pattern and froz"):
            take_over(compose(now), saved(compose(before)), named(now))
    config = compose()  # once: its directory has the time in its name
    older = saved(config)
    del older["hyper_parameters"]["optim"]["groups"]
    assert take_over(config, older, set()) == (config, [])


def test_a_run_that_goes_on_steps_the_same_matrices() -> None:
    now = ["optim=muon", "optim.optimizer.adamw=['*embed*']"]
    with pytest.raises(ValueError, match=r"optim\.optimizer\.adamw=.*other parameters to AdamW than .*\*\.router\.\*"):
        take_over(compose(*now), saved(compose("optim=muon")), named(*now))
    faster = ["optim=muon", "optim.optimizer.momentum=0.5"]
    config, _ = take_over(compose(*faster), saved(compose("optim=muon")), named(*faster))
    assert config.optim.optimizer["momentum"] == 0.5


def test_a_checkpoint_brings_no_class_to_be_made() -> None:
    meta = saved(compose())
    call = {"_target_": "os.system", "command": "true"}
    meta["hyper_parameters"]["optim"]["optimizer"] |= {"eps": call, "betas": [0.9, call]}
    config, _ = take_over(compose(), meta, set())
    assert "os.system" not in str(config)


def test_a_checkpoint_that_says_nothing_of_training_changes_nothing() -> None:
    config = compose("optim.lr=0.5")
    meta = {"global_step": 5, "hyper_parameters": {"model": {}, "moe": {}}}
    assert take_over(config, meta, set()) == (config, [])


# ---- where it goes on -----------------------------------------------------------------------------------------------


def checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / META).touch()
    return path


def test_a_run_directory_and_its_checkpoints_stand_for_the_last_one(tmp_path: Path) -> None:
    last = checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for path in (last, last.parent, last.parent.parent):
        assert find_checkpoint(path) == last


def test_a_wrong_path_is_told_with_what_lies_near(tmp_path: Path) -> None:
    last = checkpoint(tmp_path / "runs" / "main" / "one" / "checkpoints" / "last.ckpt")
    for wrong in (tmp_path / "runs" / "mian" / "one", last.with_name("lost.ckpt"), tmp_path / "runs"):
        with pytest.raises(FileNotFoundError) as caught:
            find_checkpoint(wrong)
        assert str(wrong) in str(caught.value)
        assert str(last) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="near it: none"):
        find_checkpoint(Path("/nowhere/at/all"))


def test_auto_starts_in_an_empty_directory_and_refuses_other_words(tmp_path: Path) -> None:
    config = compose("resume=auto", f"output_dir={tmp_path}")
    assert resume(config, set()) == (config, [])
    assert config.ckpt_path is None
    with pytest.raises(UsageError, match="resume=always is unknown; valid: auto"):
        resume(compose("resume=always"), set())


def test_auto_goes_on_at_the_last_checkpoint_and_in_the_same_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    for folder in ("run-20260101_000000-first", "offline-run-20260102_000000-second", "run-20260101_120000-between"):
        (tmp_path / "wandb" / folder).mkdir(parents=True)
    (tmp_path / "wandb" / "latest-run").symlink_to("offline-run-20260102_000000-second")
    monkeypatch.setattr("tedlab.resume.read_meta", lambda path: saved(compose("optim.lr=0.5")))
    config = compose("resume=auto", f"output_dir={tmp_path}")
    config, said = resume(config, set())
    assert said[0] == f"Going on from {last}, step 5."
    assert config.ckpt_path == str(last)
    assert config.logger["wandb"]["id"] == "second"
    assert config.optim.lr == 0.5


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["optim.schedule=wsd", "optim.decay_steps=3", "trainer.max_steps=8"],
            "as if the run had had it from the start.",
        ),
        (
            ["optim.schedule=wsd", "optim.decay_steps=5", "trainer.max_steps=8"],
            "differs from the old one from step 4 on: the learning rate goes from 0.5 in step 4 to 0.32 in step 5.",
        ),
        ([], None),
    ],
)
def test_a_branch_says_whether_it_is_as_if_it_had_had_its_schedule_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], said: str | None
) -> None:
    """After five steps of a stable run, to decay from there, or from two steps before."""
    stable = compose("optim.lr=0.5", "optim.schedule=constant", "optim.warmup_steps=2")
    monkeypatch.setattr("tedlab.resume.read_meta", lambda path: saved(stable))
    before = checkpoint(tmp_path / "one" / "checkpoints" / "last.ckpt")
    config = compose(f"ckpt_path={before}", f"output_dir={tmp_path / 'two'}", *overrides)
    config, sentences = resume(config, named(*overrides))
    assert (sentences[-1].endswith(said)) if said else not any("schedule" in s and "start" in s for s in sentences)
    (tmp_path / "two").mkdir()
    note_branch(config, 5)
    assert branch_of(tmp_path / "two") == {"branch/checkpoint": str(before), "branch/step": 5}
    note_branch(replace(config, ckpt_path=str(tmp_path / "two" / "checkpoints" / "last.ckpt")), 7)
    assert branch_of(tmp_path / "two")["branch/step"] == 5
    note_branch(replace(config, ckpt_path=None), None)
    assert branch_of(tmp_path / "two") == {}


FORGOTTEN = {
    "all": ([], "data.path=my corpus"),
    "all_but_a_value_that_decides_no_text": (["data.validation_samples=8"], "data.path=my corpus"),
    "nothing": (["data=text", "data.path=my corpus"], None),
    "nothing_since_other_text_is_named": (["data=stdlib"], None),
}


@pytest.mark.parametrize(("overrides", "refused"), FORGOTTEN.values(), ids=FORGOTTEN)
def test_a_run_goes_on_with_other_text_only_if_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], refused: str | None
) -> None:
    last = checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    before = compose("data=text", "data.path=my corpus")
    (tmp_path / "config.yaml").write_text(resolved_yaml(before))
    monkeypatch.setattr("tedlab.resume.read_meta", lambda path: saved(before))
    names = named(*overrides)
    config = compose("resume=auto", f"output_dir={tmp_path}", *overrides)
    if refused is None:
        assert resume(config, names)[0].ckpt_path == str(last)
    else:
        with pytest.raises(UsageError, match=f"is of a run with {refused}, .* data.path=null, which nothing names"):
            resume(config, names)


def test_a_run_goes_on_with_other_sources_only_if_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    sources = ["++data.sources={a:{path:a,weight:0.5},b:{path:b,weight:0.5}}"]
    before = compose(*sources)
    (tmp_path / "config.yaml").write_text(resolved_yaml(before))
    monkeypatch.setattr("tedlab.resume.read_meta", lambda path: saved(before))
    for overrides in (sources, ["++data.sources={a:{path:a,weight:1}}"]):
        assert resume(compose("resume=auto", f"output_dir={tmp_path}", *overrides), named(*overrides))
    with pytest.raises(
        UsageError, match=r"a run with data\.sources=.*'weight': 0\.5.* data\.sources={}, which nothing"
    ):
        resume(compose("resume=auto", f"output_dir={tmp_path}"), named())


# ---- the optimizer obeys --------------------------------------------------------------------------------------------


def model(optim: OptimConfig) -> LanguageModel:
    shape = ModelConfig(2, 16, 4, 32, LENGTH, vocab_size=256, init_std=0.2)
    return LanguageModel(shape, MoEConfig(num_experts=4), optim, seed=0)


def optim(**changes: Any) -> OptimConfig:
    options = {"eps": 1e-5, "betas": [0.9, 0.95], "weight_decay": 0.1} | changes.pop("options", {})
    optimizer = {"_target_": "torch.optim.AdamW", **options}
    return OptimConfig(optimizer, **{"lr": 1e-2, "schedule": "wsd", "warmup_steps": 2, "decay_fraction": 0.5} | changes)


NEW: dict[str, Any] = {
    "lr": 3e-3,
    "options": {"betas": [0.8, 0.9], "weight_decay": 0.5},
    "schedule": "cosine",
    "warmup_steps": 5,
    "final_lr_fraction": 0.3,
}


class Switch(Callback):
    """Changes the optimizer by hand after ``SAVED`` steps, or saves a checkpoint then."""

    def __init__(self, path: Path | None, rates: Sequence[float]) -> None:
        self.path, self.rates = path, rates

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.rates or trainer.global_step < SAVED:
            return
        for group, decay in zip(trainer.optimizers[0].param_groups, (0.5, 0.0), strict=True):
            group.update(lr=self.rates[trainer.global_step], betas=(0.8, 0.9), weight_decay=decay)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == SAVED and self.path is not None and not self.path.exists():
            trainer.save_checkpoint(self.path)


def train(
    folder: Path,
    optim: OptimConfig,
    steps: int,
    save: bool = False,
    resumed: bool = False,
    rates: Sequence[float] = (),
    total: int = TOTAL,
    saved: str = "saved",
) -> tuple[dict[str, Tensor], list[float]]:
    """Weights after so many steps, and the learning rates of those taken here. Two expert ranks."""
    text = DataConfig(
        path=str(folder / "text"),
        batch_size=BATCH,
        micro_batch_size=BATCH // 2,
        validation_samples=BATCH,
        validation_fraction=0.4,
        cache_dir=str(folder / "cache"),
    )
    module, stop, path = model(optim), Stop(steps), folder / saved
    callbacks = [Switch(path if save else None, rates), stop]
    fit = trainer(Layout(2, expert=2), max_steps=total, callbacks=callbacks, limit_val_batches=0)
    fit.fit(module, TextDataModule(text, LENGTH, seed=1), ckpt_path=path if resumed else None)
    return {name: full(p) for name, p in module.named_parameters()}, stop.rates


class Stop(Callback):
    """Ends the run after so many of the ``TOTAL`` steps that its schedule is for; collects learning rates."""

    def __init__(self, steps: int) -> None:
        self.steps, self.rates = steps, []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


BRANCHES = (SAVED + 2, SAVED + 3)  # steps of the runs that leave the stable one after SAVED steps and decay
# The new schedule by hand: a warm-up of five steps to 0.003, then a cosine to 0.3 of it at step 10.
BY_HAND = [3e-3 * factor for factor in (0.2, 0.4, 0.6, 0.8, 1.0, 1.0)]


def all_runs(folder: Path) -> dict[str, Any]:
    """One world: a run that saves and goes on, one that is continued as it was, one changed, one changed by hand."""
    straight, _ = train(folder, optim(), STEPS, save=True)
    same, _ = train(folder, optim(), STEPS, resumed=True)
    changed, rates = train(folder, optim(**NEW), STEPS, resumed=True)
    by_hand, _ = train(folder, optim(), STEPS, rates=BY_HAND)
    stable = optim(schedule="constant")
    train(folder, stable, SAVED, save=True, saved="stable")
    branches, whole = [], []
    for total in BRANCHES:
        decaying = optim(schedule="wsd", decay_steps=total - SAVED)
        branches.append(train(folder, decaying, total, resumed=True, saved="stable", total=total))
        whole.append(train(folder, decaying, total, total=total))
    found = {"straight": straight, "same": same, "changed": changed, "by_hand": by_hand, "rates": rates}
    return {**found, "branches": branches, "whole": whole}


@pytest.fixture(scope="module")
def runs(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").mkdir()
    for name in ("one", "two"):
        (folder / "text" / f"{name}.txt").write_text("".join(f"{name} {number}, " for number in range(150)))
    return pool.run(2, all_runs, folder)[0]


def test_a_run_with_the_values_of_its_checkpoint_goes_on_bit_for_bit(runs: dict[str, Any]) -> None:
    assert all(torch.equal(runs["same"][name], tensor) for name, tensor in runs["straight"].items())


def test_a_run_with_other_values_goes_on_as_one_whose_optimizer_is_changed_by_hand(runs: dict[str, Any]) -> None:
    assert runs["rates"] == pytest.approx(BY_HAND[SAVED:], rel=1e-12)
    for name, tensor in runs["by_hand"].items():
        torch.testing.assert_close(runs["changed"][name], tensor, rtol=1e-12, atol=1e-14)
    assert any(not torch.equal(runs["changed"][name], tensor) for name, tensor in runs["straight"].items())


def test_branches_of_a_stable_run_equal_runs_that_had_their_schedule_from_the_start(runs: dict[str, Any]) -> None:
    for (weights, rates), (expected, every), total in zip(runs["branches"], runs["whole"], BRANCHES, strict=True):
        decay = total - SAVED
        assert rates == pytest.approx([1e-2 * (1 - 0.9 * step / decay) for step in range(decay)])
        assert rates == every[SAVED:]
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
