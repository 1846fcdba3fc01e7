"""The same small module under Lightning's DDP, in two processes, and under TEDStrategy, in four (tensor 2 × expert 2).

Both have two data ranks, so what a module sees, logs and becomes must be equal. Under DDP the feed-forward layer is
torch's own; under TEDStrategy it is tedlab's, divided over the tensor group, with the same initial values.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tedlab import TEDStrategy
from tedlab.nn import FeedForward, FeedForwardSpec, Init
from tests.training import full, silent_trainer

STEPS, BATCH = 2, 4  # of an epoch; samples of each data rank
X = torch.randn(STEPS * BATCH * 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
DATA = TensorDataset(torch.arange(len(X)), X, X.sin().sum(-1))

Cell = Callable[[], Any]


def under_ted() -> bool:
    return os.environ["WORLD_SIZE"] == "4"


class Plain(nn.Module):
    """tedlab's FeedForward in torch's terms."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Small(LightningModule):
    """A plain layer before and after a feed-forward layer."""

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__()
        self.lr = lr
        self.calls: list[Any] = []  # what a test wants to know
        torch.manual_seed(0)
        self.inwards, self.outwards = nn.Linear(3, 8), nn.Linear(8, 1)

    def configure_model(self) -> None:
        if hasattr(self, "feed_forward"):
            return
        torch.manual_seed(1)
        plain = Plain()
        if not under_ted():
            self.feed_forward: nn.Module = plain
            return
        topology = self.trainer.strategy.topology
        self.feed_forward = FeedForward(FeedForwardSpec(8, 16, Init(), Init()), topology)
        values = dict(plain.named_parameters())
        for name, parameter in self.feed_forward.named_parameters():
            assert isinstance(parameter, DTensor)
            part = distribute_tensor(
                values[name].detach(), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            parameter.detach().copy_(part)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inwards(x).unsqueeze(1)
        return self.outwards(x + self.feed_forward(x)).flatten()

    def loss(self, batch: list[Tensor]) -> Tensor:
        return (self(batch[1]) - batch[2]).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.calls.append(("train", batch[0].tolist()))
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.calls.append(("val", batch[0].tolist()))
        self.log("val", self.loss(batch), sync_dist=True, batch_size=len(batch[0]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test", self.loss(batch), sync_dist=True, batch_size=len(batch[0]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), self.lr, eps=1e-5)


def trainer(**options: Any) -> Trainer:
    """Silent, in float64, of one epoch."""
    chosen = TEDStrategy(2, 2) if under_ted() else "ddp"
    own = {"strategy": chosen, "devices": int(os.environ["WORLD_SIZE"]), "num_sanity_val_steps": 0}
    return silent_trainer(**(own | options))


def loader(data: Any = DATA, **options: Any) -> DataLoader:
    return DataLoader(data, **({"batch_size": BATCH, "shuffle": False} | options))


def fit(module: Small | None = None, validate: bool = False, **options: Any) -> dict[str, Any]:
    """Trains; returns what both strategies must agree on."""
    module = Small() if module is None else module
    run = trainer(**options)
    run.fit(module, loader(), loader() if validate else None)
    return outcome(run, module)


def outcome(run: Trainer, module: Any) -> dict[str, Any]:
    return {
        "weights": {name: full(tensor) for name, tensor in module.state_dict().items()},
        "steps": run.global_step,
        "epochs": run.current_epoch,
        "calls": list(module.calls),
        "metrics": {name: value.item() for name, value in run.callback_metrics.items()},
    }


def attempt(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The error of a call, which every process must raise."""
    try:
        function(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def run_cells(cells: dict[str, Cell]) -> dict[str, Any]:
    """What each cell returns, by name; an error is its text, so that one does not hide the others."""
    torch.set_default_dtype(torch.float64)
    results: dict[str, Any] = {}
    for name, cell in cells.items():
        try:
            results[name] = cell()
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    return results


def assert_equal(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal, and floating-point numbers up to the order of sums."""
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda m: f"{where}: {m}")
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_equal(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), f"{where}: {ours} and {theirs}"
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(one, other, f"{where}[{i}]")
    elif isinstance(theirs, float):
        assert abs(ours - theirs) <= 1e-9 * max(1.0, abs(theirs)), f"{where}: {ours} and {theirs}"
    else:
        assert ours == theirs, f"{where}: {ours} and {theirs}"


def assert_as_under_ddp(ted: list[dict[str, Any]], ddp: list[dict[str, Any]], name: str) -> None:
    """A cell ran on every rank of both; both data ranks saw, logged and became what DDP's two processes did."""
    for rank, results in enumerate(ted):
        expected = ddp[rank // 2][name]
        assert not isinstance(expected, str), expected
        assert not isinstance(results[name], str), results[name]
        if rank in (0, 3):
            assert_equal(results[name], expected, name)
