"""TEDStrategy as a user meets it: without Hydra, with a LightningModule of their own and a plain DataLoader."""

import os
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from tedlab import TEDStrategy
from tedlab.config import CheckpointOptions, CommOptions, MoEConfig, ShardingOptions
from tedlab.moe import DispatchSpec, MoELayer, MoESpec, SlotExperts, mixtures
from tedlab.nn import FeedForward, FeedForwardSpec, Init, LayerNorm, NormSpec, initialize
from tedlab.spec import Layout, Site, Sites
from tests.pool import WorkerPool
from tests.training import full, silent_trainer

INIT = Init(std=0.5)
STEPS, BATCH = 4, 8  # samples of one step over all data ranks
X = torch.randn(STEPS * BATCH, 2, 3, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(torch.arange(len(X)), X, X.sin().sum(-1))


def test_a_collective_that_no_model_has_is_refused_before_there_is_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"'dispatch.alltoall'\. Did you mean 'dispatch.all_to_all'\? Valid: .*experts.reduce"
    ):
        TEDStrategy(2, 2, comm=CommOptions(cac=["experts.reduce", "1/dispatch.alltoall:shard"]))

    class MineSpec(DispatchSpec):
        def sites(self, layout: Layout) -> Sites:
            return Sites((Site("mine.all_to_all", "all_to_all", "expert", self.hidden),))

    mine = type("Mine", (SlotExperts,), {"dispatch": MineSpec})
    monkeypatch.setitem(mixtures._parts, "mine", mine)
    assert TEDStrategy(2, 2, comm=CommOptions(cac=["mine.all_to_all"])).comm.cac == ["mine.all_to_all"]


class Mixture(LightningModule):
    """Plain layers and buffers of the user's own around tedlab's; no token is dropped, so batches may be divided."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []
        self.losses: list[float] = []
        self.logged: list[float] = []
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

    def on_fit_start(self) -> None:
        self.at_start = {name: full(tensor) for name, tensor in self.state_dict().items()}

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = self.inwards(batch[1]) + self.offset
        x = x + self.feed_forward(self.norm(x))
        x = x + self.experts(x)[0]
        return (self.outwards(x).squeeze(-1) - batch[2]).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.seen.append(batch[0].tolist())
        self.losses.append(loss.item())
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.logged.append(self.trainer.callback_metrics["loss"].item())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01, eps=1e-5)


class Manual(Mixture):
    """The same by hand, also the clipping."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.2, gradient_clip_algorithm="norm")
        optimizer.step()
        return loss


class Halves(Manual):
    """Two backward passes before each step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer, half = self.optimizers(), len(batch[0]) // 2
        optimizer.zero_grad()
        total = torch.zeros(())
        for part in (slice(0, half), slice(half, None)):
            loss = self.loss([tensor[part] for tensor in batch]) / 2
            self.manual_backward(loss)
            total = total + loss.detach()
        self.clip_gradients(optimizer, gradient_clip_val=0.2, gradient_clip_algorithm="norm")
        optimizer.step()
        self.losses.append(total.item())
        self.log("loss", total, sync_dist=True)
        return total


def trainer(tensor: int = 1, expert: int = 1, **options: Any) -> Trainer:
    return silent_trainer(
        **({"strategy": TEDStrategy(tensor, expert), "devices": int(os.environ["WORLD_SIZE"])} | options)
    )


def loader(tensor: int) -> DataLoader:
    """Lightning divides (and, for training, shuffles) it."""
    return DataLoader(DATA, batch_size=BATCH * tensor // int(os.environ["WORLD_SIZE"]))


def train(tensor: int, expert: int, kind: type[Mixture] = Mixture, options: Any = None) -> Any:
    """Trains an epoch; returns what this process saw, logged and ended with."""
    torch.manual_seed(dist.get_rank())  # plain layers start different everywhere
    module = kind()
    fit = trainer(tensor, expert, **(options or {}))
    fit.fit(module, loader(tensor))
    plain = {n: p.detach().clone() for n, p in module.state_dict().items() if not isinstance(p, DTensor)}
    return {
        "seen": module.seen,
        "losses": module.losses,
        "logged": module.logged,
        "start": module.at_start,
        "weights": {name: full(tensor) for name, tensor in module.state_dict().items()},
        "plain": plain,
        "validation": fit.validate(module, loader(tensor), verbose=False)[0]["val"],
    }


@pytest.fixture(scope="module")
def alone(pool: WorkerPool) -> Any:
    """One process with the whole batch."""
    return pool.run(1, train, 1, 1)[0]


@pytest.fixture(scope="module")
def in_four(pool: WorkerPool) -> dict[str, Any]:
    """Four processes, tensor 2 × expert 2, by kind of training, in one world."""
    kinds: dict[str, Any] = {
        "automatic": (Mixture,),
        "clipped": (Mixture, {"gradient_clip_val": 0.2}),
        "manual": (Manual,),
        "halves": (Halves,),
    }
    return dict(zip(kinds, pool.run_each(4, train, [(2, 2, *kind) for kind in kinds.values()]), strict=True))


@pytest.fixture(scope="module")
def four(in_four: dict[str, Any]) -> Any:
    return in_four["automatic"]


def test_a_module_of_the_user_s_own_trains_as_in_one_process(alone: Any, four: Any) -> None:
    assert alone["logged"][-1] < 0.9 * alone["logged"][0]
    for rank in four:
        assert rank["logged"] == pytest.approx(alone["logged"], rel=1e-10)
        assert rank["weights"].keys() == alone["weights"].keys()
        for name, weight in rank["weights"].items():
            torch.testing.assert_close(weight, alone["weights"][name], rtol=1e-9, atol=1e-11)


def test_validation_after_training_sees_the_trained_model_and_averages(alone: Any, four: Any) -> None:
    assert [rank["validation"] for rank in four] == pytest.approx([alone["validation"]] * 4, rel=1e-10)
    assert alone["validation"] < alone["logged"][0]


def test_plain_tensors_start_as_process_0_made_them_and_stay_equal(alone: Any, four: Any) -> None:
    for rank in four:
        assert {"inwards.weight", "outwards.bias", "offset"} < rank["plain"].keys()
        for name, tensor in rank["plain"].items():
            assert torch.equal(rank["start"][name], alone["start"][name])
            assert torch.equal(tensor, four[0]["plain"][name])
            assert torch.equal(tensor, rank["start"][name]) == (name == "offset")


def test_tensor_ranks_read_the_same_batches_and_data_ranks_divide_them(four: Any) -> None:
    seen = [rank["seen"] for rank in four]
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    one, other = ([i for batch in seen[rank] for i in batch] for rank in (0, 2))
    assert not {*one} & {*other}
    assert {*one} | {*other} == {*range(len(X))}


def test_logged_values_are_means_over_data_ranks(four: Any) -> None:
    means = torch.tensor([rank["losses"] for rank in four], dtype=torch.float64).mean(0)
    assert four[0]["losses"] != pytest.approx(four[2]["losses"])
    for rank in four:
        assert rank["logged"] == pytest.approx(means.tolist())


def test_accumulating_micro_batches_gives_the_same_weights(pool: WorkerPool) -> None:
    """Two data ranks that accumulate two, against four that take one each."""
    once = pool.run(4, train, 1, 2, Mixture, {"limit_train_batches": 1})[0]["weights"]
    twice = pool.run(2, train_accumulating)[0]
    for name in once:
        torch.testing.assert_close(twice[name], once[name], rtol=1e-10, atol=1e-12)


def train_accumulating() -> dict[str, Tensor]:
    torch.manual_seed(dist.get_rank())
    module = Mixture()
    fit = trainer(1, 2, accumulate_grad_batches=2, limit_train_batches=2)
    fit.fit(module, DataLoader(DATA, batch_size=BATCH // 4))
    assert fit.global_step == 1
    return {name: full(tensor) for name, tensor in module.state_dict().items()}


def test_two_backward_passes_before_a_step_add_up(in_four: dict[str, Any]) -> None:
    whole, halves = in_four["manual"], in_four["halves"]
    assert halves[0]["losses"] == pytest.approx(whole[0]["losses"], rel=1e-10)


def test_manual_optimization_gives_the_weights_of_automatic(in_four: dict[str, Any], alone: Any) -> None:
    automatic, manual = in_four["clipped"], in_four["manual"]
    for one, other in zip(manual, automatic, strict=True):
        assert one["losses"] == other["losses"]
        assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
    difference = automatic[0]["weights"]["outwards.weight"] - alone["weights"]["outwards.weight"]
    assert difference.abs().max() > 1e-4  # the clipping did something


# ---- starting ----------------------------------------------------------------------------------------------------


def train_by_name() -> tuple[str, int, float]:
    fit, module = trainer(strategy="ted", precision="32-true"), Mixture()
    fit.fit(module, loader(1))
    return type(fit.strategy).__name__, fit.strategy.topology.degrees.world_size, module.losses[-1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_strategy_is_known_by_name_and_single_precision_trains(pool: WorkerPool, world_size: int) -> None:
    for name, size, loss in pool.run(world_size, train_by_name):
        assert (name, size) == ("TEDStrategy", world_size)
        assert loss == loss


def refused(tensor: int, expert: int, precision: str) -> str:
    fit = trainer(tensor, expert, precision=precision)
    with pytest.raises(ValueError, match=r"world size|expert is") as caught:
        fit.fit(Mixture(), loader(1))
    dist.barrier()  # do not leave while others are still connecting
    return str(caught.value)


@pytest.mark.parametrize(("tensor", "expert"), [(4, 1), (2, 2), (1, 0)])
def test_degrees_that_do_not_fit_the_devices_are_refused_at_the_start(
    pool: WorkerPool, tensor: int, expert: int
) -> None:
    for message in pool.run(2, refused, tensor, expert, "64-true"):
        assert "world size 2" in message or "expert is 0" in message


def test_there_is_no_topology_before_the_start() -> None:
    with pytest.raises(RuntimeError, match="configure_model"):
        _ = TEDStrategy(2, 2).topology


def test_options_by_their_old_names_are_taken_and_their_new_place_is_told() -> None:
    with pytest.warns(FutureWarning) as told:
        old = TEDStrategy(2, 4, dtd=True, tile="fused", async_checkpoint=True)
    assert (old.comm, old.sharding) == (CommOptions(dtd=True), ShardingOptions(tile="fused"))
    assert old.checkpoints == CheckpointOptions(async_save=True)
    assert [str(warning.message) for warning in told] == [
        "TEDStrategy(dtd=…) is now TEDStrategy(comm=CommOptions(dtd=True))",
        "TEDStrategy(tile=…) is now TEDStrategy(sharding=ShardingOptions(tile='fused'))",
        "TEDStrategy(async_checkpoint=…) is now TEDStrategy(checkpoints=CheckpointOptions(async_save=True))",
    ]
    with pytest.raises(TypeError, match="no argument 'dtb'"):
        TEDStrategy(2, 4, dtb=True)


def test_options_do_not_change_once_they_are_made() -> None:
    options = CommOptions(dtd=True)
    with pytest.raises(FrozenInstanceError, match=r"CommOptions\.dtd is set: make a copy"):
        options.dtd = False
    assert options.dtd


# ---- communication on Lightning's behalf -------------------------------------------------------------------------


class Reducing(Mixture):
    def on_train_start(self) -> None:
        reduce, rank = self.trainer.strategy.reduce, self.global_rank
        x = torch.tensor([rank, -rank], dtype=torch.float64)
        self.results = {
            "mean": reduce(x),
            "sum": reduce(x, reduce_op="sum"),
            "max": reduce(x, reduce_op="max"),
            "min": reduce(x, reduce_op="min"),
            "SUM": reduce(x, reduce_op=ReduceOp.SUM),
            "AVG": reduce(x, reduce_op=ReduceOp.AVG),
            "whole numbers": reduce(torch.tensor(rank)),
            "tensor group": reduce(x.clone(), self.trainer.strategy.topology.dense.get_group("tensor"), "sum"),
            "no tensor": reduce("text"),
            "unchanged": x,
            "broadcast": self.trainer.strategy.broadcast({"from": rank}, src=2),
        }


def reductions() -> dict[str, Any]:
    module, fit = Reducing(), trainer(2, 2, max_steps=1)
    fit.fit(module, loader(2))
    return module.results


def test_reductions_count_each_data_rank_once_and_broadcasts_reach_all_processes(pool: WorkerPool) -> None:
    for rank, results in enumerate(pool.run(4, reductions)):
        assert {k: v.tolist() if isinstance(v, Tensor) else v for k, v in results.items()} == {
            "mean": [1.5, -1.5],
            "sum": [2, -2] if rank % 2 == 0 else [4, -4],  # of processes 0 and 2, or 1 and 3
            "max": [3, 0],
            "min": [0, -3],
            "SUM": [2, -2] if rank % 2 == 0 else [4, -4],
            "AVG": [1.5, -1.5],
            "whole numbers": 1.5,
            "tensor group": [1, -1] if rank < 2 else [5, -5],
            "no tensor": "text",
            "unchanged": [rank, -rank],
            "broadcast": {"from": 2},
        }
