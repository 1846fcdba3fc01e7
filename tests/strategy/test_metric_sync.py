"""What a user's module logs and measures counts each sample once, whatever the tensor degree, as under DDP."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import BinaryAccuracy

from tests.pool import WorkerPool
from tests.strategy.test_strategy import trainer

SAMPLES = TensorDataset(torch.tensor([1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0], dtype=torch.float64))
REDUCTIONS = ("sum", "mean", "max", "min")


class Counting(LightningModule):
    """Measures its samples in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        metrics = {"SumMetric": SumMetric(), "MeanMetric": MeanMetric(), "CatMetric": CatMetric()}
        self.measures = nn.ModuleDict({stage: MetricCollection(copy.deepcopy(metrics)) for stage in ("fit", "test")})
        self.accuracy, self.ragged = BinaryAccuracy(), CatMetric()
        self.found: dict[str, Any] = {}

    def measure(self, x: Tensor, stage: str) -> None:
        x = x.double()
        for how in REDUCTIONS:
            value = getattr(torch, how)(x)
            self.log(f"{stage}/{how}", value, reduce_fx=how, sync_dist=True, on_step=False, on_epoch=True)
        for name, metric in self.measures[stage].items():
            metric.update(x)
            if name != "CatMetric":
                self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True)
        self.accuracy.update((x > 4).double(), (x > 2.5).int())
        self.log(f"{stage}/accuracy", self.accuracy, on_step=False, on_epoch=True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.measure(batch[0], "fit")
        return self.layer(batch[0].unsqueeze(1)).square().mean()

    def on_train_epoch_end(self) -> None:
        self.found["cat"] = sorted(self.measures["fit"]["CatMetric"].compute().tolist())
        self.found["gathered"] = self.all_gather(torch.tensor([float(self.global_rank)])).tolist()
        self.found["gathered from all"] = self.all_gather({"a": self.global_rank})["a"].tolist()
        strategy, one, none = self.trainer.strategy, self.global_rank == 1, False
        self.found["decisions"] = [
            strategy.reduce_boolean_decision(decision, all=every)
            for decision in (one, none, not one, True)
            for every in (True, False)
        ]

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.measure(batch[0], "test")

    def on_test_epoch_end(self) -> None:
        self.found["tested"] = sorted(self.measures["test"]["CatMetric"].compute().tolist())
        for number in range(self.global_rank // 2 + 1):  # as many values as data ranks go
            self.ragged.update(torch.tensor([10.0 * (self.global_rank // 2) + number]))
        self.found["ragged"] = sorted(self.ragged.compute().tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def counted(tensor: int) -> dict[str, Any]:
    module, fit = Counting(), trainer(tensor)
    loader = DataLoader(SAMPLES, batch_size=2)
    fit.fit(module, loader)
    copy.deepcopy(module.measures)  # as callbacks that average weights do
    logged = {name: value.item() for name, value in fit.callback_metrics.items()}
    logged |= fit.test(module, loader, verbose=False)[0]
    found = dict(module.found)
    again = trainer(1)  # as many data ranks as there are processes
    found["again"] = again.test(module, loader, verbose=False)[0]["test/SumMetric"]
    own = torch.tensor(dist.get_rank())
    gather = module.accuracy.dist_sync_fn
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)  # of another strategy
    found["elsewhere"] = [x.item() for x in gather(own)]
    dist.barrier()
    return found | {"logged": logged}


@pytest.fixture(scope="module")
def four(pool: WorkerPool) -> list[dict[str, Any]]:
    """Tensor 2 × data 2."""
    return pool.run(4, counted, 2)


def test_logged_reductions_and_metrics_count_each_sample_once(four: list[dict[str, Any]]) -> None:
    # A batch has two samples, and a data rank two batches: a sum is of all samples, the mean one of batches alike.
    expected = {"sum": 87.0, "mean": 87 / 8, "max": 34.0, "min": 1.0}
    expected |= {"SumMetric": 87.0, "MeanMetric": 87 / 8, "accuracy": 7 / 8}  # wrong is 3 alone
    for rank in four:
        for stage in ("fit", "test"):
            for name, value in expected.items():
                assert rank["logged"][f"{stage}/{name}"] == pytest.approx(value), (stage, name)


def test_gathered_metrics_hold_each_sample_once(four: list[dict[str, Any]]) -> None:
    for rank in four:
        assert rank["cat"] == rank["tested"] == sorted(SAMPLES.tensors[0].tolist())
        assert rank["ragged"] == [0.0, 10.0, 11.0]


def test_metrics_follow_their_module_to_another_strategy(four: list[dict[str, Any]]) -> None:
    for rank in four:
        assert rank["again"] == 87.0
        assert rank["elsewhere"] == [0, 1, 2, 3]


def test_a_module_gathers_from_data_ranks(four: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(four):
        assert rank["gathered"] == [[float(number % 2)], [float(number % 2 + 2)]]
        assert rank["gathered from all"] == [number % 2, number % 2 + 2]


def test_decisions_are_those_of_all_processes(four: list[dict[str, Any]]) -> None:
    for rank in four:
        one, none, all_but_one, everybody = zip(*[iter(rank["decisions"])] * 2, strict=True)
        assert one == all_but_one == (False, True)
        assert none == (False, False)
        assert everybody == (True, True)
