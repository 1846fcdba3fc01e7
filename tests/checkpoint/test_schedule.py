"""Checkpoints are written when ``checkpoint.every`` says, whatever an epoch or a validation is."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from tedlab import TEDStrategy, checkpoint
from tedlab.config import CheckpointConfig, CheckpointOptions
from tedlab.run import _checkpoints
from tests.pool import WorkerPool
from tests.test_conf import compose
from tests.training import Job, Layout, Tokens, language_model, loader, trainer

STEPS = 7


class Case(NamedTuple):
    """Steps between checkpoints, steps of an epoch, micro-batches of a step, steps between validations (0: none)."""

    every: int
    epoch: int
    accumulated: int
    validation: int


CASES = [
    *(Case(1, 2, 1, 0), Case(1, 2, 2, 5), Case(2, 2, 1, 0), Case(2, 2, 1, 2), Case(2, 2, 1, 5), Case(2, 2, 2, 5)),
    *(Case(2, 3, 2, 0), Case(3, 2, 1, 5), Case(3, 3, 1, 2), Case(3, 3, 2, 5), Case(8, 7, 1, 0)),
]


def batches(count: int) -> DataLoader:
    return DataLoader([Tokens()[i] for i in range(count)], batch_size=1)


def written(folder: Path) -> dict[Case, list[int]]:
    """The steps that checkpoints are of, and what ``last.ckpt`` is of."""
    found = {}
    config = compose("logger=none", "parallel=single")
    for number, case in enumerate(CASES):
        directory = folder / str(number)
        settings = replace(config, checkpoint=CheckpointConfig(every=case.every, keep=-1))
        every: dict[str, Any] = {"limit_val_batches": 0}
        if case.validation:
            every = {"val_check_interval": case.validation * case.accumulated, "check_val_every_n_epoch": None}
        fit = trainer(
            Layout(),
            max_steps=STEPS,
            accumulate_grad_batches=case.accumulated,
            enable_checkpointing=True,
            num_sanity_val_steps=0,
            callbacks=[_checkpoints(settings, directory)],
            **every,
        )
        fit.fit(language_model(Job(lr=0.0)), batches(case.epoch * case.accumulated), batches(1))
        paths = (directory / "checkpoints").glob("step_*.ckpt")
        steps = sorted(int(path.stem.removeprefix("step_")) for path in paths)
        last = directory / "checkpoints" / "last.ckpt"
        found[case] = [*steps, checkpoint.read_meta(last)["global_step"]] if last.exists() else steps
    return found


def test_a_checkpoint_is_written_after_every_so_many_steps(pool: WorkerPool, tmp_path: Path) -> None:
    for case, steps in pool.run(1, written, tmp_path, timeout=300)[0].items():
        expected = list(range(case.every, STEPS + 1, case.every))
        assert steps == [*expected, *expected[-1:]], case


def newest(folder: Path) -> tuple[list[str], list[str]]:
    """What is kept of a run of four steps, and of one that goes on from the second, which another kind of run wrote."""
    config = replace(compose("logger=none"), checkpoint=CheckpointConfig(every=1, keep=2))
    names, resume = [], None
    for directory in (folder / "first", folder / "second"):
        fit = trainer(Layout(), max_steps=4, enable_checkpointing=True, callbacks=[_checkpoints(config, directory)])
        fit.fit(language_model(Job()), batches(8), ckpt_path=resume)
        names.append(sorted(path.name for path in (directory / "checkpoints").iterdir()))
        resume = folder / "first" / "checkpoints" / "step_3.ckpt"
    return names[0], names[1]


def test_the_newest_are_kept_and_what_was_resumed_from_is_not_written_again(pool: WorkerPool, tmp_path: Path) -> None:
    first, second = pool.run(1, newest, tmp_path)[0]
    assert first == ["last.ckpt", "step_3.ckpt", "step_4.ckpt"]
    assert second == ["last.ckpt", "step_4.ckpt"]


def whole_at_every_moment(folder: Path) -> list[int]:
    """The steps that Lightning's own ``last.ckpt`` leads to while slow checkpoints are written in the background."""
    save = dcp.save

    def slow(*args: Any, **options: Any) -> None:
        time.sleep(0.2)
        save(*args, **options)

    seen = []

    class Look(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            if os.path.lexists(folder / "last.ckpt"):
                seen.append(checkpoint.read_meta(folder / "last.ckpt")["global_step"])

    dcp.save = slow
    try:
        callbacks = [Look(), ModelCheckpoint(folder, save_last="link", save_top_k=-1, every_n_train_steps=2)]
        strategy = TEDStrategy(checkpoints=CheckpointOptions(async_save=True))
        fit = trainer(Layout(2), max_steps=6, enable_checkpointing=True, callbacks=callbacks, strategy=strategy)
        fit.fit(language_model(Job()), loader(Layout(2), Job(), fit.global_rank))
    finally:
        dcp.save = save
    return [*seen, checkpoint.read_meta(folder / "last.ckpt")["global_step"]]


def test_the_last_checkpoint_is_whole_at_every_moment_while_one_is_written(pool: WorkerPool, tmp_path: Path) -> None:
    """With Lightning's own callback: its link would lead to what is not there yet."""
    for seen in pool.run(2, whole_at_every_moment, tmp_path / "kept"):
        assert seen == sorted(seen)
        assert seen[-1] == 6
