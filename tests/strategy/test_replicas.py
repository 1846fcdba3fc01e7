"""Drift between processes that should hold the same is found, and named."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from tedlab import ParallelDegrees, TEDStrategy, Topology
from tedlab.checksum import checksum
from tedlab.config import ShardingOptions
from tedlab.strategy.replicas import check_batch
from tests.pool import WorkerPool
from tests.strategy.test_strategy import Mixture, loader, trainer

CPU = torch.device("cpu")


# ---- checksums ---------------------------------------------------------------------------------------------------


def test_a_checksum_tells_any_bit_any_place_and_any_order() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = [3, 5, 200_000, 1, 0, 70_000, 300_000]
    tensors = [torch.randn(size, generator=draw) for size in sizes]
    whole = checksum(tensors, CPU).item()
    assert checksum([t.clone() for t in tensors], CPU).item() == whole
    seen = {whole}
    for number, tensor in enumerate(tensors):
        for place in {0, len(tensor) // 2, len(tensor) - 1} if len(tensor) else ():
            for bit in (0, 31):
                changed = tensor.clone()
                changed.view(torch.int32)[place] ^= torch.tensor(1 << bit).to(torch.int32)
                seen.add(checksum([*tensors[:number], changed, *tensors[number + 1 :]], CPU).item())
    cases = 1 + 2 * (3 + 3 + 3 + 1 + 3 + 3)
    assert len(seen) == cases
    assert checksum(tensors[::-1], CPU).item() not in seen
    signs = tensors[2].clone()
    signs[[10, 20]] *= -1  # sums of bits would not see two signs
    assert checksum([*tensors[:2], signs, *tensors[3:]], CPU).item() not in seen
    swapped = tensors[2].clone()
    swapped[[10, 20]] = swapped[[20, 10]]
    assert checksum([*tensors[:2], swapped, *tensors[3:]], CPU).item() not in seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
def test_checksums_are_of_any_type_and_shape(dtype: torch.dtype) -> None:
    x = (torch.arange(35).view(5, 7) % 4 == 0).to(dtype)
    assert checksum([x.T], CPU).item() == checksum([x.T.contiguous()], CPU).item() != checksum([x], CPU).item()
    assert checksum([x[0, 0]], CPU).item() != checksum([x[0, 1]], CPU).item()
    assert checksum([torch.tensor(float("nan"))], CPU).item() == checksum([torch.tensor(float("nan"))], CPU).item()


# ---- parameters --------------------------------------------------------------------------------------------------


class Drifting(Mixture):
    """After its second step something of one process changes by its last bit."""

    def __init__(self, what: str | None, culprit: int) -> None:
        super().__init__()
        self.what, self.culprit = what, culprit

    def on_train_batch_end(self, *_: Any) -> None:
        if self.what is not None and self.global_step == 2 and self.global_rank == self.culprit:
            tensor = self.state_dict()[self.what]
            own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            own.view(-1)[-1:].view(torch.int64)[0] ^= 1


# What drifts, on which of four processes (tensor 2 × expert 2): that, and its counterparts.
DRIFTS = {
    "inwards.weight": (3, ("process 3 differs from that of process 1", "the data group")),
    "norm.weight": (1, ("process 3 differs from that of process 1", "the data group")),
    "feed_forward.up.weight": (2, ("process 2 differs from that of process 0", "the data group")),
    "experts.router.weight": (2, ("process 2 differs from that of process 0", "the data group")),
    "experts.experts.down_bias": (3, ("process 3 differs from that of process 2", "the expert_tensor group")),
}


def drift() -> dict[str, str]:
    said = {}
    for what, (culprit, _) in DRIFTS.items():
        fit = trainer(2, 2, strategy=TEDStrategy(2, 2, check_replicas_every=2, sharding=ShardingOptions(zero=False)))
        with pytest.raises(RuntimeError, match="Replicas") as caught:
            fit.fit(Drifting(what, culprit), loader(2))
        said[what] = str(caught.value)
        dist.barrier()
    for every, zero in ((None, False), (1, True), (1, False)):
        fit = trainer(2, 2, strategy=TEDStrategy(2, 2, check_replicas_every=every, sharding=ShardingOptions(zero=zero)))
        fit.fit(Drifting("inwards.weight" if every is None else None, 3), loader(2))
    return said


def test_the_first_parameter_that_drifts_is_named_on_every_process(pool: WorkerPool) -> None:
    answers = pool.run(4, drift)
    assert all(answer == answers[0] for answer in answers)
    for what, (_, parts) in DRIFTS.items():
        message = answers[0][what]
        assert f"after step 2, '{what}'" in message
        for part in parts:
            assert part in message, message


def drift_of_experts() -> str:
    fit = trainer(1, 2, strategy=TEDStrategy(1, 2, check_replicas_every=1, sharding=ShardingOptions(zero=False)))
    with pytest.raises(RuntimeError, match="Replicas") as caught:
        fit.fit(Drifting("experts.experts.up", 3), loader(1))
    dist.barrier()
    return str(caught.value)


def test_experts_are_compared_with_their_own_replicas(pool: WorkerPool) -> None:
    for message in pool.run(4, drift_of_experts):
        assert "after step 2, 'experts.experts.up' of process 3 differs from that of process 1" in message
        assert "the expert_data group" in message


def saved_with_drift(directory: str) -> None:
    fit = trainer(2, 2, strategy=TEDStrategy(2, 2, check_replicas_every=100), max_steps=1)
    module = Mixture()
    fit.fit(module, loader(2))
    fit.save_checkpoint(f"{directory}/good.ckpt")
    fit.strategy.replicas._checked = None
    if dist.get_rank() == 1:
        module.inwards.weight.data[0, 0] += 1e-9
    with pytest.raises(RuntimeError, match="Replicas"):
        fit.save_checkpoint(f"{directory}/bad.ckpt")
    dist.barrier()


def test_a_checkpoint_holds_no_replicas_that_drifted(pool: WorkerPool, tmp_path: Any) -> None:
    pool.run(4, saved_with_drift, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["good.ckpt"]


def test_steps_between_checks_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match="check_replicas_every is 0"):
        TEDStrategy(check_replicas_every=0)


# ---- batches -----------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """A batch of the user's own."""

    name: str
    values: Any


def batches() -> dict[str, str]:
    """Of each kind of difference between tensor ranks what is said; of equal batches too."""
    topology, rank = Topology(ParallelDegrees(4, tensor=2)), dist.get_rank()
    odd, data = rank % 2, rank // 2
    x = torch.arange(6.0).view(2, 3) + data
    cases: dict[str, Any] = {
        "value": x + 1e-6 * odd,
        "dtype": x.double() if odd else x,
        "shape": x.view(3, 2) if odd else x,
        "order": [x, -x][:: -1 if odd else 1],
        "key": {"b" if odd else "a": x},
        "text": {"a": [x, ("one", "other")[odd]]},
        "number": (x, 3 + odd),
        "array": {"a": np.arange(3) + odd},
        "missing": [x] * (1 + odd),
        "nested": {"a": [{"b": (x, [x + odd])}]},
        "data class": Sample("a", {"x": x + odd}),
        "only of one group": x + (odd and data),
        "equal tensors": x,
        "equal": {"a": [x, "text", 3, None, np.arange(3)], "b": Sample("a", (x,)), "c": object()},
    }
    seen = {}
    for name, batch in cases.items():
        try:
            check_batch(batch, "training", topology)
            seen[name] = ""
        except ValueError as error:
            seen[name] = str(error)
    return seen


def test_any_difference_between_tensor_ranks_batches_is_refused_by_all(pool: WorkerPool) -> None:
    for seen in pool.run(4, batches):
        for name, message in seen.items():
            processes = "process 3 is not that of process 2" if name == "only of one group" else "process 1 is not that"
            assert (message == "") == name.startswith("equal"), name
            assert not message or (processes in message and "distributed_sampler_kwargs" in message)


class OfThisProcess(Dataset):
    """Noise from a generator of its own, seeded by the process."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> list[Tensor]:
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.float64)
        return [torch.tensor(index), x, x.sum(-1)]


class Predicting(Mixture):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


def refusals() -> list[str]:
    said = []
    for stage in ("fit", "validate", "test", "predict"):
        with pytest.raises(ValueError, match="Tensor ranks compute on one batch") as caught:
            getattr(trainer(2, 2), stage)(Predicting(), DataLoader(OfThisProcess(), batch_size=2))
        said.append(str(caught.value))
        dist.barrier()
    return said


def test_a_data_set_that_differs_between_tensor_ranks_is_refused_in_every_loop(pool: WorkerPool) -> None:
    for rank, said in enumerate(pool.run(4, refusals)):
        for stage, message in zip(("training", "validation", "test", "prediction"), said, strict=True):
            own = 1 if stage == "training" or rank < 2 else 3  # outside training each tensor group compares its own
            assert f"first {stage} batch of process {own}" in message


def threads() -> int:
    torch.set_num_threads(2 + dist.get_rank())
    run = trainer(1, max_steps=1)
    run.fit(Mixture(), loader(1))
    return torch.get_num_threads()


def test_all_processes_compute_with_as_many_threads(pool: WorkerPool) -> None:
    assert pool.run(2, threads) == [2, 2]
