"""A run whose steps take different numbers of samples, in rows of different lengths: what each reads and exchanges."""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tedlab.callbacks import CommunicationLedger, Journal
from tedlab.certify.shrink import shrink
from tedlab.config import RampConfig, TrainConfig, with_values
from tedlab.data import TextDataModule
from tedlab.data.ramp import Ramp
from tedlab.nn import rows_of
from tedlab.run import build
from tedlab.validate import complete
from tests.certify.runs import composed
from tests.pool import WorkerPool
from tests.training import full

STEPS, LENGTH, MICRO = 9, 9, 1
FROM = (2, 5, 6)  # in the first stage, at an end of an epoch in the second, and where the third begins
RAMP = [RampConfig(until=3, batch_size=4, sequence_length=3), RampConfig(until=6, batch_size=8)]
SIZES, ROWS = [4] * 3 + [8] * 3 + [2] * 3, [3] * 3 + [9] * 6  # of each step


class Read(Callback):
    """Collects what each step reads, and after which steps there is a validation."""

    def __init__(self, path: Path | None = None) -> None:
        self.samples: dict[int, list[Tensor]] = defaultdict(list)
        self.rows: dict[int, set[tuple[int, ...]]] = defaultdict(set)
        self.validated: list[int] = []
        self.weights: dict[int, Tensor] = {}
        self.path = path

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
        self.samples[trainer.global_step].append(batch)
        self.rows[trainer.global_step].add((*rows_of(batch, pl_module.length).shape,))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.weights[trainer.global_step] = full(next(pl_module.parameters()))
            if self.path is not None and trainer.global_step in FROM:
                trainer.save_checkpoint(self.path / f"{trainer.global_step}.ckpt")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated.append(trainer.global_step)


def fitted(config: TrainConfig, path: Path | None = None) -> dict[str, Any]:
    ramp = Ramp.of(config.data, LENGTH)
    read, ledger = Read(path), CommunicationLedger(config)
    journal = Journal(lambda first, last: ramp.tokens(first, last, LENGTH))
    trainer, module, data = build(config, [ledger, journal, read], logged=False)
    trainer.fit(module, data, ckpt_path=config.ckpt_path)
    assert isinstance(data, TextDataModule)
    every = torch.stack([data.training_samples[n] for n in range(len(data.training_samples))])
    return {
        **{"samples": dict(read.samples), "rows": dict(read.rows), "validated": read.validated, "every": every},
        **{"weights": read.weights, "differences": ledger.differences(trainer), "tokens": journal.tokens()},
    }


def all_runs(config: TrainConfig, path: Path) -> dict[Any, dict[str, Any]]:
    """One world: a whole run, one that goes on from each of several of its steps, and one that goes on without ramp."""
    runs: dict[Any, dict[str, Any]] = {"whole": fitted(config, path)}
    for step in FROM:
        runs[step] = fitted(with_values(config, {"ckpt_path": str(path / f"{step}.ckpt")}))
    constant = {"ckpt_path": str(path / "5.ckpt"), "data.ramp": [], "trainer.accumulate_grad_batches": 1}
    runs["constant"] = fitted(with_values(config, constant))
    return runs


@pytest.fixture(scope="module")
def runs(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ramp")
    small = shrink(composed("parallel=dp2", "moe.num_experts=2", "data.micro_batch_size=1"), folder)
    trainer = {**small.trainer, "max_steps": STEPS, "limit_val_batches": None, "accumulate_grad_batches": None}
    data = {"data.batch_size": 2, "data.micro_batch_size": MICRO, "data.ramp": RAMP, "data.validation_samples": 2}
    others = {"model.sequence_length": LENGTH, "trainer": trainer, "validate_every": 2}
    config = with_values(small, {**data, **others})
    for name in ("one", "two"):
        (folder / "text" / f"{name}.txt").write_text(name + "".join(chr(20 + n % 101) for n in range(15 * LENGTH - 1)))
    return pool.run(2, all_runs, complete(config), folder)


def taken(runs: list[dict[Any, dict[str, Any]]], key: Any, step: int) -> list[list[int]]:
    """The samples of a step, in the order in which one process would accumulate them."""
    of_ranks = [run[key]["samples"][step] for run in runs]
    return [sample.tolist() for together in zip(*of_ranks, strict=True) for batch in together for sample in batch]


def test_each_step_takes_its_samples_in_the_order_of_the_epoch(runs: list[dict[Any, dict[str, Any]]]) -> None:
    every = runs[0]["whole"]["every"]
    epoch, read, seed = 0, 0, 0
    for step, size in enumerate(SIZES):
        if read + size > len(every):
            epoch, read = epoch + 1, 0
        order = np.random.default_rng([seed, epoch]).permutation(len(every))
        assert taken(runs, "whole", step) == every[order[read : read + size]].tolist(), step
        read += size
    assert epoch >= 1  # it goes into a further epoch
    assert runs[0]["whole"]["tokens"] == sum(SIZES) * LENGTH


def test_rows_have_the_length_of_the_stage_and_lose_no_pair(runs: list[dict[Any, dict[str, Any]]]) -> None:
    for step, length in enumerate(ROWS):
        assert runs[0]["whole"]["rows"][step] == {(MICRO * LENGTH // length, length + 1)}
    sample = torch.arange(2 * 13).view(2, 13)
    rows = rows_of(sample, 4)
    pairs = [(a, b) for row in rows.tolist() for a, b in pairwise(row)]
    assert pairs == [(a, b) for row in sample.tolist() for a, b in pairwise(row)]


def test_validation_is_due_after_steps_not_batches(runs: list[dict[Any, dict[str, Any]]]) -> None:
    assert runs[0]["whole"]["validated"] == [2, 4, 6, 8]
    assert runs[0][5]["validated"] == [6, 8]


def test_the_ledger_equals_the_closed_form_of_all_stages(runs: list[dict[Any, dict[str, Any]]]) -> None:
    assert [run[key]["differences"] for run in runs for key in run] == [{}] * (2 * len(runs[0]))


@pytest.mark.parametrize("step", FROM)
def test_a_resumed_run_reads_and_learns_the_rest(runs: list[dict[Any, dict[str, Any]]], step: int) -> None:
    for later in range(step, STEPS):
        assert taken(runs, step, later) == taken(runs, "whole", later), later
    assert torch.equal(runs[0][step]["weights"][STEPS], runs[0]["whole"]["weights"][STEPS])
    assert runs[0][step]["tokens"] == runs[0]["whole"]["tokens"]


def test_a_run_goes_on_with_other_stages_at_the_next_sample(runs: list[dict[Any, dict[str, Any]]]) -> None:
    every = runs[0]["whole"]["every"]
    assert len(every) == 15  # a step of four, four and four, one of eight of the next epoch and one of that after it
    order = np.random.default_rng([0, 2]).permutation(15)
    after = [sample for step in range(5, STEPS) for sample in taken(runs, "constant", step)]
    assert after[:6] == every[order[8:14]].tolist()
    assert len(after) == 2 * (STEPS - 5)
