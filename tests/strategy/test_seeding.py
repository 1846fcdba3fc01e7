"""Random numbers in a user's module and data set: alike on tensor ranks, different on data ranks."""

import multiprocessing as mp
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler

from tedlab import ParallelDegrees, Topology
from tedlab.comm import recomputed
from tests.pool import WorkerPool
from tests.strategy.test_strategy import trainer

Numbers = list[list[float]]


class Noise(Dataset):
    """Of every kind."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, torch.rand(()).item(), np.random.rand(), random.random()], dtype=torch.float64)


class Drawing(LightningModule):
    """Remembers what it was given and what it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 4), nn.Dropout()
        self.batches: Numbers = []
        self.masks: Numbers = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            batch = torch.cat(list(batch.values()))
        self.batches.append(batch.flatten().tolist())
        self.masks.append([*self.dropout(torch.ones(64)).tolist(), random.random(), np.random.rand()])
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.batches.append(batch.flatten().tolist())
        self.masks.append(torch.rand(3).tolist())

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def own_seed(worker: int) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)


def noisy(**options: Any) -> DataLoader:
    return DataLoader(Noise(), batch_size=2, num_workers=1, multiprocessing_context="fork", **options)


def fitted(seed: int | None, loaders: Any, workers: bool = False) -> tuple[Numbers, Numbers]:
    """Batches and masks of two epochs."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    os.environ.pop("PL_SEED_WORKERS", None)
    if seed is not None:
        seed_everything(seed, workers=workers, verbose=False)
    module = Drawing()
    trainer(2, max_epochs=2).fit(module, loaders)
    return module.batches, module.masks


def draws() -> dict[str, Any]:
    mp.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # so that loaders may have workers
    torch.manual_seed(100 + torch.distributed.get_rank())  # processes start differently
    found: dict[str, Any] = {
        "no seed": fitted(None, noisy()),
        "seeded": fitted(7, noisy()),
        "seeded again": fitted(7, noisy()),
        "another seed": fitted(8, noisy()),
        "workers=True": fitted(7, noisy(), workers=True),
        "persistent": fitted(7, noisy(persistent_workers=True)),
        "several": fitted(7, {"a": noisy(), "b": noisy()}),
        "own": fitted(7, noisy(worker_init_fn=own_seed)),
        "main process": fitted(7, DataLoader(Noise(), batch_size=2)),
    }
    for stage in ("validate", "test", "predict"):
        os.environ.pop("PL_GLOBAL_SEED", None)
        module = Drawing()
        getattr(trainer(2), stage)(module, noisy())
        found[stage] = module.batches, module.masks
    sampler = SubsetRandomSampler(range(8))
    found["sampled"] = fitted(None, DataLoader(Noise(), batch_size=2, sampler=sampler))
    return found


@pytest.fixture(scope="module")
def four(pool: WorkerPool) -> list[dict[str, Any]]:
    return pool.run(4, draws)


CASES = ["no seed", "seeded", "workers=True", "persistent", "several", "main process", "validate", "test", "predict"]


def noise_of(batches: Numbers) -> list[float]:
    """Without the indices of samples, which data ranks divide."""
    return [value for batch in batches for sample in zip(*[iter(batch)] * 4, strict=True) for value in sample[1:]]


@pytest.mark.parametrize("case", CASES)
def test_tensor_ranks_draw_alike_and_data_ranks_do_not(four: list[dict[str, Any]], case: str) -> None:
    for one, other in ((0, 1), (2, 3)):
        assert four[one][case] == four[other][case]
    (batches, masks), (others_batches, others_masks) = four[0][case], four[2][case]
    assert all(mine != theirs for mine, theirs in zip(masks, others_masks, strict=True))
    noise = noise_of(batches) + noise_of(others_batches)
    assert len(set(noise)) == len(noise)  # nor is anything drawn twice, in either epoch


def test_a_seed_decides_on_all_that_is_drawn(four: list[dict[str, Any]]) -> None:
    for rank in four:
        assert rank["seeded"] == rank["seeded again"]
        assert rank["seeded"][1] != rank["another seed"][1]
        assert rank["no seed"][1] != rank["seeded"][1]


def test_a_worker_function_of_the_user_s_own_is_kept(four: list[dict[str, Any]]) -> None:
    assert noise_of(four[0]["own"][0]) == noise_of(four[2]["own"][0])


def test_what_a_random_sampler_draws_is_divided_over_data_ranks(four: list[dict[str, Any]]) -> None:
    for epoch in (slice(0, 2), slice(2, 4)):
        indices = [index for rank in (0, 2) for batch in four[rank]["sampled"][0][epoch] for index in batch[::4]]
        assert sorted(indices) == list(range(8))


# ---- activation checkpointing ------------------------------------------------------------------------------------


def gradients_with_dropout() -> list[list[float]]:
    topology = Topology(ParallelDegrees(1))
    found = []
    for twice in (False, True):
        torch.manual_seed(3)
        x = torch.ones(32, requires_grad=True)
        y = recomputed(F.dropout, x, counters=topology.recomputation, plan={}) if twice else F.dropout(x)
        torch.rand(5)
        y.sum().backward()
        assert x.grad is not None
        found.append(x.grad.tolist())
    return found


def test_recomputation_drops_what_the_first_pass_dropped(pool: WorkerPool) -> None:
    ((kept, recomputed),) = pool.run(1, gradients_with_dropout)
    assert kept == recomputed
    assert {*kept} == {0.0, 2.0}
