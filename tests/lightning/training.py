"""Tiny modules of a user's own, and runs of them through Lightning, which the tests of its contract compare."""

import os
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tedlab import TEDStrategy
from tedlab.config import MoEConfig
from tedlab.moe import MoELayer, MoESpec
from tedlab.nn import FeedForward, FeedForwardSpec, Init, LayerNorm, NormSpec, initialize
from tests.training import full, silent_trainer

INIT = Init(std=0.5)
STEPS, BATCH = 2, 8  # of one epoch, and samples of a step over all data ranks
X = torch.randn(STEPS * BATCH, 2, 3, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, X.sin().sum(-1))


class Mixture(LightningModule):
    """Plain layers and a buffer around tedlab's; no token is dropped, so that batches may be divided."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = lr
        self.losses: list[float] = []
        self.inwards = nn.Linear(3, 8)
        self.register_buffer("offset", torch.randn(8))

    def configure_model(self) -> None:
        if hasattr(self, "experts"):
            return
        topology = self.trainer.strategy.topology
        moe = MoEConfig(num_experts=4, capacity_factor=None, capacity_multiple=1)
        self.norm = LayerNorm(NormSpec(8), topology)
        self.feed_forward = FeedForward(FeedForwardSpec(8, 16, INIT, INIT), topology)
        self.experts = MoELayer(MoESpec(FeedForwardSpec(8, 16, INIT, INIT), moe), topology)
        self.outwards = nn.Linear(8, 1)
        initialize(self, seed=0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inwards(x) + self.offset
        x = x + self.feed_forward(self.norm(x))
        x = x + self.experts(x)[0]
        return self.outwards(x).squeeze(-1)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(self.trainer.strategy.reduce(loss.detach()).item())
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True, batch_size=len(batch[0]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test", self.loss(batch), sync_dist=True, batch_size=len(batch[0]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), self.lr, eps=1e-5)


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def strategy(**options: Any) -> TEDStrategy:
    """Tensor 2 × expert 2 on four processes; tensor 2 on two."""
    return TEDStrategy(2 if world_size() > 1 else 1, 2 if world_size() > 2 else 1, **options)


def trainer(**options: Any) -> Trainer:
    """A silent float64 Trainer on CPU, of one epoch."""
    return silent_trainer(**({"strategy": strategy(), "devices": world_size()} | options))


def loader(data: Any = DATA, **options: Any) -> DataLoader:
    """In order; Lightning divides it over data ranks so that together they have the batches of one process."""
    return DataLoader(data, **({"batch_size": BATCH // max(1, world_size() // 2), "shuffle": False} | options))


def fit(module: LightningModule, ckpt_path: Any = None, **options: Any) -> Trainer:
    """Trains; returns the Trainer."""
    run = trainer(**options)
    run.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return run


def mixture(**options: Any) -> Mixture:
    """With the same initial values in every process and every run."""
    torch.manual_seed(0)
    return Mixture(**options)


def weights(module: LightningModule) -> dict[str, Tensor]:
    """All parameters and buffers, unsharded, on every process."""
    return {name: full(tensor) for name, tensor in module.state_dict().items()}


def assert_same(weights: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    """Equal up to the order of sums in float64."""
    assert weights.keys() == expected.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], expected[name], rtol=rtol, atol=1e-11, msg=lambda m, n=name: n + m)
