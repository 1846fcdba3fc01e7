"""A loss or gradient that is not finite ends a run in all processes alike, before a weight has changed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tedlab import checkpoint
from tedlab.optim import NonFiniteError
from tedlab.optim.finite import check_saved
from tests.lightning.plain import Seeded, ordered
from tests.lightning.training import strategy, trainer, weights
from tests.pool import WorkerPool


class Diverging(Seeded):
    """In step 3 something goes wrong on data rank 1, or everywhere."""

    def __init__(self, case: str, always: bool = False) -> None:
        super().__init__()
        self.case, self.always = case, always
        self.after: list[dict[str, Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        bad = self.trainer.strategy.topology.comm.rank("data") == 1
        if bad and (self.always or self.trainer.global_step == 2):
            if self.case == "loss":
                return loss * torch.nan
            if self.case == "gradient":
                self.outwards.weight.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.after.append(weights(self))

    def configure_optimizers(self) -> Any:
        rate = torch.inf if self.case == "rate" else 0.01
        return torch.optim.SGD(self.parameters(), rate)


class Dropping(Seeded):
    """With two optimizers; the second drops its batch whenever the loss is not finite: here, every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        self.manual_backward(self.inwards.weight.square().sum())
        first.step()
        first.zero_grad()
        loss = self.outwards.weight.square().sum() * (torch.nan if batch_idx % 2 == 0 else 1.0)
        self.manual_backward(loss)
        if loss.isfinite():
            second.step()
        second.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([layer.weight], 0.1) for layer in (self.inwards, self.outwards)]


def dropped() -> dict[str, float]:
    """By how much weights have shrunk."""
    module = Dropping()
    run = trainer(max_epochs=2)
    before: dict[str, Tensor] = {}
    module.on_fit_start = lambda: before.update(weights(module))  # type: ignore[method-assign]
    run.fit(module, ordered())
    names = ("inwards.weight", "outwards.weight")
    return {name: (weights(module)[name] / before[name]).mean().item() for name in names}


def stopped(folder: Path, case: str, always: bool = False, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    module = Diverging(case, always)
    saving = ModelCheckpoint(folder / case, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last="link")
    run = trainer(max_epochs=20, enable_checkpointing=True, callbacks=[saving], strategy=strategy(**options))
    with pytest.raises(NonFiniteError) as caught:
        run.fit(module, ordered())
    now = weights(module)
    return {
        "message": str(caught.value),
        "steps": len(module.after),
        "unchanged": not module.after or all(torch.equal(now[name], w) for name, w in module.after[-1].items()),
        "last": checkpoint.read_meta(folder / case / "last.ckpt")["global_step"] if module.after else None,
    }


def all_stopped(folder: Path) -> dict[str, Any]:
    results = {case: stopped(folder / "plain", case) for case in ("loss", "gradient")}
    results["rate"] = stopped(folder / "plain", "rate")
    results["dropped"] = dropped()
    results["scaled"] = stopped(folder / "scaled", "gradient", always=True, loss_scale=4.0)
    return results


def trained_on() -> bool:
    torch.manual_seed(0)
    module = Diverging("loss")
    trainer(max_epochs=2, strategy=strategy(stop_on_nonfinite=False)).fit(module, ordered())
    return bool(weights(module)["outwards.weight"].isnan().any())


@pytest.fixture(scope="module")
def four(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pool.run(4, all_stopped, tmp_path_factory.mktemp("stopped"))


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("loss", ["in step 3", "the loss is nan in batch 0", "rank 2, 3"]),
        ("gradient", ["in step 3", "gradient of batch 0 is not finite", "all losses are"]),
    ],
)
def test_the_run_stops_before_a_weight_changes_and_says_where(four: Any, case: str, told: list[str]) -> None:
    for rank in four:
        assert rank[case]["message"] == four[0][case]["message"]
        assert [words for words in told if words not in rank[case]["message"]] == []
        assert rank[case]["steps"] == 2
        assert rank[case]["unchanged"]
        assert rank[case]["last"] == 2


def test_the_parameter_whose_gradient_is_not_finite_is_named(four: Any) -> None:
    assert "of outwards.weight;" in four[0]["gradient"]["message"]


def test_weights_that_a_finite_gradient_has_spoilt_are_not_saved(four: Any) -> None:
    """An infinite learning rate: every gradient was finite, the weights are not."""
    for rank in four:
        assert rank["rate"]["message"].startswith("Not saved: after step 1")


def test_a_loss_scale_at_its_smallest_is_not_to_blame(four: Any) -> None:
    """4 and 2 are skipped as overflows; with 1 the run stops, weights as they were."""
    for rank in four:
        assert rank["scaled"]["steps"] == 2
        assert "with the smallest loss scale" in rank["scaled"]["message"]
        assert rank["scaled"]["unchanged"]


def test_a_batch_that_the_user_drops_stops_nothing(four: Any) -> None:
    """A step of gradient descent on w² leaves 0.8 of a weight: four of one optimizer, two of the other."""
    for rank in four:
        assert rank["dropped"] == pytest.approx({"inwards.weight": 0.8**4, "outwards.weight": 0.8**2})


def test_that_there_are_no_weights_is_said_on_the_device_of_collectives() -> None:
    devices = []

    def all_reduce(x: Tensor, *_: Any, **__: Any) -> Tensor:
        devices.append(x.device.type)
        return torch.zeros(())

    check_saved([], SimpleNamespace(all_reduce=all_reduce), 1, torch.device("meta"))  # type: ignore[arg-type]
    assert devices == ["meta"]


def test_it_can_be_told_to_go_on(pool: WorkerPool) -> None:
    assert all(pool.run(4, trained_on))
