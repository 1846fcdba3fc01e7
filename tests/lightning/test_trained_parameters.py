"""Which parameters a step moves: frozen, thawed and added ones, and those that nobody used, as under plain torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn

from tedlab.config import ShardingOptions
from tests.lightning.plain import Plain, Seeded, adamw, batches, ordered
from tests.lightning.training import STEPS, Mixture, assert_same, fit, strategy, trainer, weights
from tests.pool import WorkerPool

EPOCHS = 2
LATER = ("feed_forward", "experts", "norm")  # what some cases begin to train, or cease to, after a step


def is_later(name: str) -> bool:
    return name.startswith(LATER)


class Changing(Seeded):
    """In each case something happens before the second step, and in some the loss leaves something out."""

    def __init__(self, case: str = "freeze") -> None:
        super().__init__()
        self.case = case
        self.spare = nn.Linear(3, 2)

    def configure_model(self) -> None:
        super().configure_model()
        if self.case in ("thaw", "add"):
            self.later_trains(False)

    def later_trains(self, trains: bool) -> None:
        for name, p in self.named_parameters():
            if is_later(name):
                p.requires_grad_(trains)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step >= 1:
            self.later_trains(self.case != "freeze")  # which is in no checkpoint
            if self.case == "add" and self.trainer.global_step == 1:
                added = [p for name, p in self.named_parameters() if is_later(name)]
                self.optimizers().add_param_group({"params": added, "lr": 0.03})

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        rank = self.trainer.strategy.topology.comm.rank("data")
        return self.loss_of(batch, self.trainer.global_step, spare=float(rank == 1))

    def loss_of(self, batch: list[Tensor], step: int, spare: float) -> Tensor:
        """``spare`` is used in step 2 by one data rank of two."""
        if self.case != "unused":
            return self.loss(batch)
        feed_forward = self.feed_forward
        if step % 2:
            self.feed_forward = nn.Identity()
        try:
            loss = self.loss(batch)
        finally:
            self.feed_forward = feed_forward
        return loss + spare * self.spare.weight.square().sum() if step == 2 and spare else loss

    def configure_optimizers(self) -> Any:
        chosen = [p for name, p in self.named_parameters() if self.case != "add" or not is_later(name)]
        return torch.optim.AdamW(chosen, self.lr, eps=1e-5)


CASES = ("freeze", "thaw", "add", "unused")
HOW: dict[str, dict[str, Any]] = {
    "": {},
    "fused": {"sharding": ShardingOptions(tile="fused")},
    "tiled, overlapped, small buckets": {"sharding": ShardingOptions(tile=7, overlap=True, bucket_elements=100)},
    "replicated": {"sharding": ShardingOptions(zero=False)},
}


def run(case: str, how: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = Changing(case)
    trainer(max_epochs=EPOCHS, strategy=strategy(**HOW[how])).fit(module, ordered())
    return {name: tensor for name, tensor in weights(module).items() if name != "offset"}


def guests() -> dict[tuple[str, str], dict[str, Tensor]]:
    return {(case, how): run(case, how) for case in CASES for how in HOW if not how or case in ("freeze", "unused")}


def judged(case: str) -> dict[str, Tensor]:
    def make() -> Mixture:
        torch.manual_seed(0)
        return Changing(case)

    def optimizer(leaves: dict[str, nn.Parameter]) -> Any:
        return adamw({name: leaf for name, leaf in leaves.items() if case != "add" or not is_later(name)})

    plain = Plain(optimizer, make)
    for step, batch in enumerate(batches(EPOCHS)):
        if step == 1:
            plain.module.later_trains(case != "freeze")
            if case == "add":
                added = [leaf for name, leaf in plain.leaves.items() if is_later(name)]
                plain.optimizer.add_param_group({"params": added, "lr": 0.03})
        plain.backward(plain.module.loss_of(batch, step, spare=0.5))
        plain.step()
    return plain.weights


def judge() -> dict[str, dict[str, Tensor]]:
    return {case: judged(case) for case in CASES}


@pytest.fixture(scope="module")
def four(pool: WorkerPool) -> Any:
    return pool.run(4, guests)


@pytest.fixture(scope="module")
def alone(pool: WorkerPool) -> Any:
    return pool.run(1, judge)[0]


@pytest.mark.parametrize("case", CASES)
def test_parameters_move_when_torch_would_move_them(four: Any, alone: Any, case: str) -> None:
    for rank in four:
        assert_same(rank[case, ""], alone[case])


@pytest.mark.parametrize("how", [how for how in HOW if how])
@pytest.mark.parametrize("case", ["freeze", "unused"])
def test_whatever_step_and_sharding_leave_the_others_alone(four: Any, alone: Any, case: str, how: str) -> None:
    for rank in four:
        assert_same(rank[case, how], alone[case])


def test_the_cases_differ(alone: Any) -> None:
    for case in CASES[1:]:
        assert not torch.equal(alone[case]["feed_forward.up.weight"], alone["freeze"]["feed_forward.up.weight"])


# ---- checkpoints of them -----------------------------------------------------------------------------------------


def resumed(folder: Path, case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of two epochs in one go, and of the second epoch continued from the first's checkpoint."""

    def start() -> Changing:
        torch.manual_seed(0)
        return Changing(case)

    whole, first, second = start(), start(), start()
    fit(whole, max_epochs=EPOCHS)
    run = fit(first)
    run.save_checkpoint(folder / case)
    fit(second, ckpt_path=folder / case, max_epochs=EPOCHS)
    return weights(whole), weights(second)


def all_resumed(folder: Path) -> dict[str, Any]:
    return {case: resumed(folder, case) for case in ("add", "unused")}


@pytest.fixture(scope="module")
def continued(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pool.run(2, all_resumed, tmp_path_factory.mktemp("resumed"))


@pytest.mark.parametrize("case", ["add", "unused"])
def test_added_groups_and_step_counts_of_their_own_survive_a_checkpoint(continued: Any, case: str) -> None:
    """After the first epoch the added parameters have stepped once, the others twice."""
    for rank in continued:
        whole, second = rank[case]
        assert_same(second, whole, rtol=1e-12)


# ---- Lightning's callback ----------------------------------------------------------------------------------------


class Thaw(BaseFinetuning):
    """The experts, in the second epoch."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        if hasattr(pl_module, "experts"):
            self.freeze(pl_module.experts)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.experts, optimizer, lr=0.02)


class Filtered(Seeded):
    def configure_model(self) -> None:
        super().configure_model()
        for p in self.experts.parameters():
            p.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr, eps=1e-5)


def finetuned() -> tuple[dict[str, Tensor], list[int]]:
    torch.manual_seed(0)
    module = Filtered()
    run = trainer(max_epochs=EPOCHS, callbacks=[Thaw()])
    run.fit(module, ordered())
    sizes = [len(group["params"]) for group in run.optimizers[0].param_groups]
    return {name: tensor for name, tensor in weights(module).items() if name != "offset"}, sizes


def finetuned_alone() -> dict[str, Tensor]:
    def make() -> Mixture:
        torch.manual_seed(0)
        return Filtered()

    def optimizer(leaves: dict[str, nn.Parameter]) -> Any:
        return adamw({name: leaf for name, leaf in leaves.items() if not name.startswith("experts")})

    plain = Plain(optimizer, make)
    for step, batch in enumerate(batches(EPOCHS)):
        if step == STEPS:
            for p in plain.module.experts.parameters():
                p.requires_grad_(True)
            added = [leaf for name, leaf in plain.leaves.items() if name.startswith("experts")]
            plain.optimizer.add_param_group({"params": added, "lr": 0.02})
        plain.backward(plain.module.loss(batch))
        plain.step()
    return plain.weights


def test_base_finetuning_thaws_and_adds_a_group(pool: WorkerPool) -> None:
    expected = pool.run(1, finetuned_alone)[0]
    for found, sizes in pool.run(4, finetuned):
        assert sizes[1] == 5
        assert_same(found, expected)


def strangers() -> str:
    class Stranger(Seeded):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().add_param_group({"params": [nn.Parameter(torch.zeros(3))]})

    with pytest.raises(ValueError, match="parameter group 1") as caught:
        fit(Stranger())
    return str(caught.value)


def test_a_parameter_that_the_module_does_not_have_is_refused_in_a_sentence(pool: WorkerPool) -> None:
    (message,) = pool.run(1, strangers)
    assert "shape (3,)" in message
    assert "tensor" not in message
