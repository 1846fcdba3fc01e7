"""Data ranks with unequal numbers of samples, batches or tokens: it works, or a sentence comes before anybody waits."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from tedlab import ParallelDegrees, TEDStrategy, Topology
from tedlab.config import CommOptions, ModelConfig, MoEConfig
from tedlab.models import GPT
from tedlab.moe import MoELayer, MoESpec, SlotExperts
from tedlab.nn import FeedForwardSpec, initialize
from tests.pool import WorkerPool
from tests.strategy.test_strategy import DATA, INIT, Mixture, loader, trainer

EVERYTHING = MoEConfig(num_experts=4, capacity_factor=None, capacity_multiple=1)  # no token is ever dropped
KINDS = {"capacity": EVERYTHING, "dropless": replace(EVERYTHING, dispatch="dropless")}


class Predictor(Mixture):
    """Predicts sample by sample, remembers how often it was asked, and can be without experts."""

    def __init__(self, moe: MoEConfig) -> None:
        super().__init__()
        self.moe, self.asked = moe, 0

    def configure_model(self) -> None:
        super().configure_model()
        if isinstance(self.experts.experts, SlotExperts) != (self.moe.dispatch == "capacity"):
            self.experts = MoELayer(
                MoESpec(FeedForwardSpec(8, 16, INIT, INIT), self.moe), self.trainer.strategy.topology
            )
            initialize(self, seed=0)

    def predict_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[int, list[float]]:
        self.asked += 1
        x = self.inwards(batch[1]) + self.offset
        x = x + self.feed_forward(self.norm(x))
        y = self.outwards(x + self.experts(x)[0]).squeeze(-1)
        return dict(zip(batch[0].tolist(), y.tolist(), strict=True))


def predictions(tensor: int, expert: int, kind: str, samples: list[int], options: dict[str, Any]) -> Any:
    """Of each loader, of this process; how often it was asked; and whether training is possible afterwards."""
    torch.manual_seed(0)
    module = Predictor(KINDS[kind])
    fit = trainer(tensor, expert, strategy=TEDStrategy(tensor, expert, **options))
    loaders = [DataLoader(Subset(DATA, range(count)), batch_size=2) for count in samples]
    found = fit.predict(module, loaders if len(loaders) > 1 else loaders[0])
    asked = module.asked
    fit.fit(module, loader(tensor))
    return found if len(loaders) > 1 else [found], asked


LAYOUTS: dict[str, tuple[int, tuple[int, int], dict[str, Any]]] = {
    "T2_E2": (4, (2, 2), {}),
    "T2_E2_dtd": (4, (2, 2), {"comm": CommOptions(dtd=True)}),
    "T2_E2_fused": (4, (2, 2), {"comm": CommOptions(dtd=True, fuse_reduce_scatter=True)}),
    "E2_D2": (4, (1, 2), {}),
    "E2_D2_gathered": (4, (1, 2), {"comm": CommOptions(dedup="group")}),
    "E4": (4, (1, 4), {}),
    "T2_E2_folded": (4, (2, 2), {"expert_tensor_parallel_size": 1}),
    "D4_folded": (4, (1, 1), {"expert_tensor_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def alone(pool: WorkerPool) -> dict[int, float]:
    """One process's predictions of 13 samples."""
    (([batches], asked),) = pool.run(1, predictions, 1, 1, "capacity", [13], {})
    assert asked == 7
    return {sample: y for batch in batches for sample, y in batch.items()}


SAMPLE = {("T2_E2_dtd", "capacity"), ("E4", "capacity"), ("T2_E2", "dropless")}  # of what else takes longer


def marked(layout: str, kind: str) -> list[pytest.MarkDecorator]:
    """CI tries each layout with one kind at least."""
    if (layout, kind) in SAMPLE:
        return []
    often = ([*LAYOUTS].index(layout) + [*KINDS].index(kind)) % len(KINDS) == 0
    return [pytest.mark.slow if often else pytest.mark.exhaustive]


@pytest.mark.parametrize(
    ("layout", "kind"),
    [pytest.param(layout, kind, marks=marked(layout, kind)) for layout in LAYOUTS for kind in KINDS],
)
def test_each_sample_is_predicted_once_whatever_divides_their_number(
    pool: WorkerPool, alone: dict[int, float], layout: str, kind: str
) -> None:
    world, degrees, options = LAYOUTS[layout]
    counts = [13, 9]  # in batches of 2: of the second, two data ranks have 5 and 4 samples, four have 3, 2, 2 and 2
    answers = pool.run(world, predictions, *degrees, kind, counts, options)
    for number, count in enumerate(counts):
        seen: Counter[int] = Counter()
        for rank in range(0, world, degrees[0]):
            for batch in answers[rank][0][number]:
                seen.update(batch.keys())
                for sample, y in batch.items():
                    torch.testing.assert_close(torch.tensor(y), torch.tensor(alone[sample]), rtol=1e-9, atol=1e-11)
        assert seen == Counter(range(count))
    asked = [asked for _, asked in answers]
    own = [sum(map(len, batches)) for batches, _ in answers]
    divided = ParallelDegrees(world, *degrees, expert_tensor=options.get("expert_tensor_parallel_size"))
    for rank in range(world):  # all of an expert group, or of a folded layout, kept step, some by repeating
        assert len({asked[member] for member in divided.groups(rank)[divided.in_step]}) == 1
    assert sum(own) < sum(asked)


# ---- tokens ------------------------------------------------------------------------------------------------------


def said_of(tokens: list[list[int]], config: MoEConfig, patience: float = 60) -> list[str]:
    """What an MoE layer says when each process brings so many tokens, call by call; empty if nothing."""
    size = dist.get_world_size()
    topology = Topology(ParallelDegrees(size, expert=size))
    topology.slots.patience = timedelta(seconds=patience)
    layer = MoELayer(MoESpec(FeedForwardSpec(4, 8, INIT, INIT), config), topology)
    said = []
    for counts in tokens:
        try:
            layer(torch.ones(1, counts[dist.get_rank()], 4, requires_grad=True))[0].sum().backward()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


CAPACITY = MoEConfig(num_experts=4, capacity_factor=1.0, capacity_multiple=1)


def test_unequal_tokens_are_refused_in_the_first_forward_pass_on_every_process(pool: WorkerPool) -> None:
    for said in pool.run(2, said_of, [[8, 12]], CAPACITY):
        assert "process 0 8 tokens, 2 slots for each expert, process 1 12 tokens, 3 slots" in said[0]
        assert "padding" in said[0]
        assert "moe.dispatch=dropless" in said[0]


def test_numbers_of_tokens_may_change_together_and_unequal_ones_with_equal_capacity_may_pass(pool: WorkerPool) -> None:
    for said in pool.run(2, said_of, [[8, 8], [12, 12], [4, 4], [4, 4], [8, 8]], CAPACITY):
        assert said == [""] * 5
    for said in pool.run(2, said_of, [[8, 7], [8, 7]], replace(CAPACITY, capacity_multiple=8)):
        assert said == ["", ""]
    for said in pool.run(2, said_of, [[8, 12], [5, 1]], replace(CAPACITY, dispatch="dropless")):
        assert said == ["", ""]


def test_numbers_that_become_unequal_are_refused(pool: WorkerPool) -> None:
    for said in pool.run(2, said_of, [[8, 8], [12, 16]], CAPACITY):
        assert said[0] == ""
        assert "process 0 12 tokens, 3 slots for each expert, process 1 16 tokens, 4 slots" in said[1]


def said_by_second() -> tuple[list[str], int]:
    """What a layer says in a process that had another topology before; and of two layers, how often they announced."""
    rank = dist.get_rank()
    said_of([[8, 8], [12, 12]], CAPACITY)
    topology = Topology(ParallelDegrees(2, expert=2))
    layers = [MoELayer(MoESpec(FeedForwardSpec(4, 8, INIT, INIT), CAPACITY), topology) for _ in range(2)]
    said = []
    for tokens in ([8, 8], [4, 4], [8, 8], [4, 4], [8, 8], [4, 4], [12, 16]):
        if rank == 1 and tokens[0] == 12:
            time.sleep(0.3)  # what the first topology announced is there before this process has spoken
        try:
            layers[tokens[0] == 4](torch.ones(1, tokens[rank], 4))
        except ValueError as error:
            said.append(str(error))
    return said, topology.slots._changes


def test_nobody_heeds_what_an_earlier_topology_announced_and_layers_differ_at_no_cost(pool: WorkerPool) -> None:
    for said, changes in pool.run(2, said_by_second):
        assert len(said) == 1
        assert "process 0 12 tokens, 3 slots for each expert, process 1 16 tokens, 4 slots" in said[0]
        assert changes == 2  # the second layer's first, and the last


def said_alone(directory: str) -> None:
    """Process 1 alone has another number of tokens; it leaves as a process does that has raised."""
    patience = 1 if dist.get_rank() == 1 else 60
    said = said_of([[8, 8], [8, 12]], CAPACITY, patience)
    if dist.get_rank() == 1:
        with open(f"{directory}/said", "w") as file:
            file.write(said[1])
        os._exit(1)


def test_a_process_whose_number_alone_changes_says_so_instead_of_waiting(pool: WorkerPool, tmp_path: Any) -> None:
    with pytest.raises(AssertionError):  # the other has waited until the first was gone
        pool.run(2, said_alone, str(tmp_path), timeout=20)
    said = (tmp_path / "said").read_text()
    assert "with a micro-batch of 12 tokens after 8 process 1 has waited 1 s" in said
    assert "moe.dispatch=dropless" in said


# ---- batches -----------------------------------------------------------------------------------------------------


class Uneven(Dataset):
    """As long as its process's rank is high."""

    def __len__(self) -> int:
        return 2 + dist.get_rank()

    def __getitem__(self, index: int) -> list[Tensor]:
        return [tensor[index] for tensor in DATA.tensors]


class WithTests(Mixture):
    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.loss(batch)


class Sharded(IterableDataset):
    """Of whose shards the second data rank, of tensor 2 × data 2, has none."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        for index in range(2 if dist.get_rank() < 2 else 0):
            yield [tensor[index] for tensor in DATA.tensors]


def without_a_batch() -> None:
    trainer(2, 1).test(WithTests(), DataLoader(Sharded()), verbose=False)


def test_a_data_rank_without_a_batch_keeps_nobody_waiting(pool: WorkerPool) -> None:
    pool.run(4, without_a_batch, timeout=30)


def refusals() -> dict[str, str]:
    said = {}
    for stage in ("fit", "validate", "test"):
        with pytest.raises(ValueError, match="in step") as caught:
            getattr(trainer(1, 2, use_distributed_sampler=False), stage)(WithTests(), DataLoader(Uneven()))
        said[stage] = str(caught.value)
        dist.barrier()
    # Without experts elsewhere each process validates for itself.
    trainer(1, 1, use_distributed_sampler=False).test(WithTests(), DataLoader(Uneven()), verbose=False)
    return said


def test_unequal_numbers_of_batches_are_refused_where_processes_meet_in_each(pool: WorkerPool) -> None:
    for said in pool.run(2, refusals):
        for stage, name in (("fit", "training"), ("validate", "validation"), ("test", "tests")):
            assert f"go through {name} in step, but process 0 has 2 batches and process 1 has 3" in said[stage]


# ---- compiled ----------------------------------------------------------------------------------------------------


def compiled(uneven: bool) -> list[list[float]]:
    """Losses of a compiled model with unequal tokens, where these may be, or else what it says."""
    size = dist.get_world_size()
    model = ModelConfig(1, 8, 2, 16, 8, vocab_size=32, init_std=0.5, compile="aot_eager")
    moe = replace(EVERYTHING, every=1)
    results = []
    for layout in (ParallelDegrees(size, expert=size),):
        topology = Topology(layout, options=CommOptions())
        network = GPT(model, moe, topology, seed=0)
        topology.slots.uneven = uneven
        ids = torch.arange(16).view(2, 8)[: 2 - topology.comm.rank("data") % 2]
        try:
            with torch.no_grad():
                results.append(network(ids)[0][0, -1].tolist())
        except ValueError as error:
            results.append(str(error))  # type: ignore[arg-type]
    return results


def test_compiled_blocks_are_checked_too_and_predict_unequal_numbers(pool: WorkerPool) -> None:
    ((expected,),) = pool.run(1, compiled, True)
    for (found,) in pool.run(2, compiled, True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))
    for (said,) in pool.run(2, compiled, False):
        assert "process 0 16 tokens, 16 slots" in said
