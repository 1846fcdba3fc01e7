"""What is drawn for a token is even, independent of everything else that is drawn, and the same in every layout."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tedlab.context import BatchContext
from tedlab.data import MicroBatchSampler

ROWS, COLUMNS = 2048, 8
BINS = 16


def context(seed: int = 0, step: int = 0, micro_batch: int = 0) -> BatchContext:
    made = BatchContext(torch.device("cpu"))
    made.seed = seed
    made.at(step, micro_batch)
    return made


def drawn(seed: int = 0, step: int = 0, stream: int = 0, first: int = 0, stepwise: bool = True) -> Tensor:
    return context(seed, step).uniform(stream, torch.arange(first, first + ROWS), COLUMNS, stepwise)


def far_from_even(counts: Tensor) -> float:
    """By how many standard deviations χ² of these counts exceeds what even ones give."""
    expected = counts.sum() / counts.numel()
    chi2, freedom = float(((counts - expected) ** 2 / expected).sum()), counts.numel() - 1
    return (chi2 - freedom) / math.sqrt(2 * freedom)


SEEDS = (0, 1, 1234, 2**32 - 1, 2**32, 2**61 + 7)


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_are_even_between_zero_and_one(seed: int) -> None:
    for step, stream in itertools.product((0, 1, 999_999), (0, 5)):
        u = drawn(seed, step, stream)
        assert u.dtype == torch.float64
        assert u.min() > 0
        assert u.max() < 1
        assert far_from_even(torch.histc(u.flatten(), 64, 0, 1)) < 5
        assert (u.mean() - 0.5).abs() < 5 / math.sqrt(12 * u.numel())
        assert all(far_from_even(torch.histc(column, BINS, 0, 1)) < 6 for column in u.T)
        assert len(u.unique()) > 0.999 * u.numel()


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_for_neighbouring_steps_streams_tokens_columns_and_seeds_are_independent(seed: int) -> None:
    u = drawn(seed)
    others = {
        "step": drawn(seed, step=1),
        "stream": drawn(seed, stream=1),
        "token": drawn(seed, first=1),
        "column": u.roll(1, 1),
        "seed": drawn(seed + 1),
        "step and stream changed places": drawn(seed, step=0, stream=7),
    }
    for name, v in others.items():
        pairs = (u * BINS).long() * BINS + (v * BINS).long()
        assert far_from_even(torch.bincount(pairs.flatten(), minlength=BINS * BINS).double()) < 5, name
        correlation = torch.corrcoef(torch.stack((u.flatten(), v.flatten())))[0, 1].abs()
        assert correlation < 5 / math.sqrt(u.numel()), name
    assert not torch.equal(drawn(seed, step=7), drawn(seed, stream=7))


def test_who_draws_again_draws_the_same_and_few_of_many_rows_are_drawn_alike() -> None:
    u = drawn(3, 5, 2)
    assert torch.equal(u, drawn(3, 5, 2))
    some = torch.tensor([17, 3, 2000])
    assert torch.equal(context(3, 5).uniform(2, some, COLUMNS), u[some])
    assert torch.equal(context(3, 5, micro_batch=4).uniform(2, some, 3), u[some, :3])


def test_what_is_not_drawn_in_each_step_anew_depends_on_the_seed_alone() -> None:
    assert torch.equal(drawn(step=0, stepwise=False), drawn(step=9, stepwise=False))
    assert not torch.equal(drawn(step=0, stepwise=False), drawn(step=0))
    assert not torch.equal(drawn(seed=1, stepwise=False), drawn(stepwise=False))


LENGTH, BATCH = 6, 24


def numbers(replicas: int, micro_batch: int, shards: int) -> dict[int, list[int]]:
    """By sample of an epoch's second step, the numbers of its tokens, as data ranks and tensor ranks find them."""
    found: dict[int, list[int]] = {}
    for rank in range(replicas):
        sampler = MicroBatchSampler(
            range(100), num_replicas=replicas, rank=rank, batch_size=BATCH, micro_batch_size=micro_batch, seed=1
        )
        per_step = BATCH // replicas
        samples = list(sampler)[per_step : 2 * per_step]
        for number in range(per_step // micro_batch):
            own = samples[number * micro_batch : (number + 1) * micro_batch]
            here = context(micro_batch=number * replicas + rank)
            parts = [here.tokens(micro_batch, LENGTH // shards, shard, shards) for shard in range(shards)]
            tokens = torch.cat([part.view(micro_batch, -1) for part in parts], 1)
            found |= dict(zip(own, tokens.tolist(), strict=True))
    return found


def test_a_token_has_the_same_number_in_every_layout() -> None:
    whole = numbers(1, BATCH, 1)
    assert sorted(itertools.chain(*whole.values())) == list(range(BATCH * LENGTH))
    for replicas, micro_batch, shards in itertools.product((1, 2, 4), (1, 2, 3, 6), (1, 2, 3)):
        assert numbers(replicas, micro_batch, shards) == whole, (replicas, micro_batch, shards)


def test_experts_drawn_by_the_largest_number_are_drawn_equally_often() -> None:
    experts = context(2).uniform(0, torch.arange(20_000), 12).topk(3, dim=-1).indices
    assert far_from_even(torch.bincount(experts.flatten(), minlength=12).double()) < 5
    pairs = np.sort(experts[:, :2].numpy(), 1) @ (12, 1)
    counts = np.unique(pairs, return_counts=True)[1]
    assert len(counts) == 66  # all pairs of different experts
    assert far_from_even(torch.tensor(counts).double()) < 5
