"""Every hook of LightningModule, LightningDataModule and Callback is called as under DDP, with what it is to change."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor, nn

from tests.lightning.introspection import hooks_of
from tests.lightning.side_by_side import (
    BATCH,
    DATA,
    Small,
    assert_as_under_ddp,
    attempt,
    fit,
    loader,
    outcome,
    run_cells,
    trainer,
)
from tests.pool import WorkerPool

pytestmark = pytest.mark.slow  # worlds of four processes that train for each of many cases

WORK = ("training_step", "validation_step", "test_step", "predict_step", "forward")


def recording(base: type, names: list[str], owner: str, events: list[str]) -> type:
    """A subclass that notes the calls of these methods, and does what they do."""

    def note(name: str) -> Any:
        def method(self: Any, *args: Any, **options: Any) -> Any:
            events.append(f"{owner}.{name}")
            return getattr(base, name)(self, *args, **options)

        return method

    return type(f"Recording{base.__name__}", (base,), {name: note(name) for name in names})


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def recorded(tmp: Any = None) -> list[str]:
    events: list[str] = []
    module = recording(Small, hooks_of(LightningModule), "module", events)()
    data = recording(Data, hooks_of(LightningDataModule), "data", events)()
    callback = recording(Callback, hooks_of(Callback), "callback", events)()
    run = trainer(callbacks=[callback], num_sanity_val_steps=1)
    run.fit(module, data)
    run.validate(module, data, verbose=False)
    run.test(module, data, verbose=False)
    run.predict(module, data)
    return events


class Stepping(Small):
    """Overrides what there is to override in a step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx == 0:
            optimizer_closure()  # a step that is left out, as in an alternating scheme
        else:
            optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.calls.append("zero_grad")
        optimizer.zero_grad(set_to_none=False)

    def backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        (2 * loss).backward()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.calls.append(("scheduler", metric))
        scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return [tensor.to(device) for tensor in batch]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0], batch[1] * 0.5, batch[2]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0], batch[1] + 0.5, batch[2]]

    def configure_callbacks(self) -> Any:
        return [Noting()]


class Noting(Callback):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.calls.append("configured callback")


class Logging(Small):
    """All ways to log."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        for how in ("mean", "max", "min"):
            self.log(how, loss, reduce_fx=how, sync_dist=True, on_step=True, on_epoch=True)
            self.log(f"local {how}", loss, reduce_fx=how, on_epoch=True, on_step=False)
        self.log_dict({"a": loss, "b": 2.0}, on_step=True, sync_dist=True)
        self.log("counted", loss, batch_size=batch_idx + 1, on_epoch=True, on_step=False, sync_dist=True)
        return loss


class Plateau(Small):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val"}}

    def on_train_end(self) -> None:
        self.calls.append(self.optimizers().param_groups[0]["lr"])


class NoOptimizer(Small):
    def configure_optimizers(self) -> None:
        return None


class Alone(Small):
    """An optimizer, not in a list; a step without a loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if batch_idx else None


class Gathering(Small):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        gathered = self.all_gather({"ids": batch[0], "text": "kept"})
        self.calls.append([gathered["ids"].flatten().tolist(), gathered["text"]])
        self.trainer.strategy.barrier("a name")
        self.print("once")


class Stateful(Small):
    """State of its own in the checkpoint."""

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        checkpoint["mine"] = {"epoch": self.current_epoch}

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        self.calls.append(checkpoint["mine"])


class StatefulData(Data):
    def state_dict(self) -> Any:
        return {"position": 7}

    def load_state_dict(self, state_dict: Any) -> None:
        self.loaded = state_dict


class StatefulCallback(Callback):
    def state_dict(self) -> Any:
        return {"count": 3}

    def load_state_dict(self, state_dict: Any) -> None:
        self.loaded = state_dict

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        checkpoint["of a callback"] = 5

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self.found = checkpoint["of a callback"]


def stateful() -> Any:
    import tempfile
    from pathlib import Path

    from tests.lightning.test_arguments import broadcast

    path = Path(broadcast(tempfile.mkdtemp())) / "x.ckpt"
    run = trainer(callbacks=[StatefulCallback()])
    run.fit(Stateful(), StatefulData())
    run.save_checkpoint(path)
    module, data, callback = Stateful(), StatefulData(), StatefulCallback()
    again = trainer(callbacks=[callback], max_epochs=2)
    again.fit(module, data, ckpt_path=path)
    return outcome(again, module), data.loaded, callback.loaded, callback.found


class Properties(Small):
    """Notes what it knows of its place."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 3)

    def on_train_start(self) -> None:
        assert self.global_rank == torch.distributed.get_rank() == self.local_rank
        self.calls += [self.device_mesh, self.on_gpu, self._fabric, self.trainer.is_global_zero and "first"]

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[1])


def properties() -> Any:
    module, run = Properties(), trainer(enable_model_summary=True)
    run.fit(module, loader())
    module.calls[-1] = torch.distributed.get_rank() > 0 or module.calls[-1]
    return outcome(run, module), torch.cat(run.predict(module, loader()))


class Failing(Small):
    def on_train_batch_start(self, *_: Any) -> None:
        raise LookupError("on purpose")


def failed() -> Any:
    events: list[str] = []
    callback = recording(Callback, ["on_exception"], "callback", events)()
    data = recording(Data, ["on_exception"], "data", events)()
    error = attempt(trainer(callbacks=[callback]).fit, Failing(), data)
    return [error, events]


def from_datasets() -> Any:
    data = LightningDataModule.from_datasets(DATA, batch_size=BATCH)
    module, run = Small(), trainer()
    torch.manual_seed(5)
    run.fit(module, data)
    return data.name, run.global_step, sorted(i for _, batch in module.calls for i in batch)[:0]


class FrozenWhole(Small):
    """All of it is frozen, and thawed again."""

    def on_fit_start(self) -> None:
        self.freeze()
        self.calls.append([p.requires_grad for p in self.parameters()])
        self.unfreeze()
        self.calls.append([p.requires_grad for p in self.parameters()])


# ---- models ----------------------------------------------------------------------------------------------------------


class Tied(Small):
    """A parameter under two names, and a module that is used twice."""

    def configure_model(self) -> None:
        super().configure_model()
        self.again, self.tied = self.outwards, nn.Linear(8, 1)
        self.tied.weight = self.outwards.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.inwards(x).unsqueeze(1)
        return (self.outwards(x + self.feed_forward(self.feed_forward(x))) + self.tied(x) + self.again(x)).flatten()


class Normalised(Small):
    """Batch norm, whose running statistics follow what each process sees."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Mixed(Small):
    """Parameters in single precision among those in double."""

    def __init__(self) -> None:
        super().__init__()
        self.single = nn.Linear(3, 3).float()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.single(x.float()).double())


class Compiled(Small):
    """A compiled layer among others."""

    def configure_model(self) -> None:
        super().configure_model()
        if not hasattr(self, "compiled"):
            self.compiled = torch.compile(nn.Linear(3, 3), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.compiled(x))


CELLS = {
    "calls": recorded,
    "overridden steps": lambda: fit(Stepping(), max_epochs=2),
    "self.log": lambda: fit(Logging(), max_epochs=2),
    "ReduceLROnPlateau": lambda: fit(Plateau(), True, max_epochs=3),
    "properties": properties,
    "on_exception": failed,
    "data from data sets": from_datasets,
    "frozen": lambda: fit(FrozenWhole()),
    "no optimizer": lambda: fit(NoOptimizer()),
    "a step without a loss": lambda: [attempt(fit, Alone())],
    "all_gather": lambda: fit(Gathering()),
    "state": stateful,
    "tied": lambda: fit(Tied()),
    "batch norm": lambda: fit(Normalised(), True, max_epochs=2),
    "batch norm, accumulating": lambda: fit(Normalised(), True, max_epochs=2, accumulate_grad_batches=2),
    "mixed": lambda: fit(Mixed(), precision="32-true"),
    "compiled": lambda: fit(Compiled()),
}


def everything() -> dict[str, Any]:
    return run_cells(CELLS)


@pytest.fixture(scope="module")
def ddp(pool: WorkerPool) -> list[dict[str, Any]]:
    return pool.run(2, everything)


@pytest.fixture(scope="module")
def ted(pool: WorkerPool) -> list[dict[str, Any]]:
    return pool.run(4, everything)


@pytest.mark.parametrize("name", CELLS)
def test_it_is_as_under_ddp(ddp: Any, ted: Any, name: str) -> None:
    assert_as_under_ddp(ted, ddp, name)
