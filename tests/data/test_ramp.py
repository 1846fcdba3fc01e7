"""Stages of steps of different sizes: which samples each step takes, wherever a run resumes and in which layout."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tedlab.data.position import Position
from tedlab.data.ramp import Ramp, Stage
from tedlab.data.sampler import MicroBatchSampler

SEED, SAMPLES = 3, 53


def ramp_of(*sizes: int, ends: tuple[int, ...]) -> Ramp:
    return Ramp([Stage(until, size, 8) for size, until in zip(sizes, (*ends, None), strict=True)])


def by_hand(ramp: Ramp) -> Iterator[tuple[int, list[int], int]]:
    """Epoch, samples and end in the epoch of one step after the other, each drawn by itself."""
    epoch, read, step = 0, 0, 0
    while True:
        size = next(stage.batch_size for stage in ramp.stages if stage.until is None or step < stage.until)
        if read + size > SAMPLES:
            epoch, read = epoch + 1, 0
        order = np.random.default_rng([SEED, epoch]).permutation(SAMPLES)
        yield epoch, order[read : read + size].tolist(), read + size
        read, step = read + size, step + 1


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.data())
def test_steps_take_samples_in_order_in_every_layout_and_from_every_step(sizes: list[int], data: st.DataObject) -> None:
    ranks, micro = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]))
    ends = sorted(data.draw(st.sets(st.integers(1, 20), min_size=len(sizes) - 1, max_size=len(sizes) - 1)))
    ramp = ramp_of(*(4 * size for size in sizes), ends=tuple(ends))
    first, steps = data.draw(st.integers(0, 12)), 25
    expected = [step for step, _ in zip(by_hand(ramp), range(steps), strict=False)]
    position = ramp.after(Position(), 0, first, SAMPLES)
    if first:
        assert position == Position(expected[first - 1][0], expected[first - 1][2])
    start = position.of_next_step(ramp.at(first).batch_size, SAMPLES)
    last = expected[-1][0]
    of_ranks = []
    for rank in range(ranks):
        sampler = MicroBatchSampler(
            range(SAMPLES), num_replicas=ranks, rank=rank, batch_size=ramp, micro_batch_size=micro, seed=SEED
        )
        sampler.start_at(start, first)
        dealt = []
        for epoch in range(start.epoch, last):
            sampler.set_epoch(epoch)
            indices = list(sampler)
            assert len(indices) <= len(sampler)
            dealt += [indices[i : i + micro] for i in range(0, len(indices), micro)]
        of_ranks.append(dealt)
    found = [i for together in zip(*of_ranks, strict=True) for batch in together for i in batch]
    assert found == [i for epoch, samples, _ in expected[first:] if epoch < last for i in samples]


def test_what_steps_read() -> None:
    ramp = ramp_of(2, 6, ends=(5,))
    assert [ramp.at(step).batch_size for step in (0, 4, 5, 100)] == [2, 2, 6, 6]
    assert ramp.tokens(3, 7, sample=10) == (2 + 2 + 6 + 6) * 10
    assert list(ramp.between(5, 5)) == []


def test_sizes_of_every_stage_are_checked() -> None:
    for sizes, message in (((3, 4), "batch_size=3 cannot be dealt"), ((54, 4), r"53 samples.*batch_size=54")):
        with pytest.raises(ValueError, match=message):
            MicroBatchSampler(
                range(SAMPLES), num_replicas=2, rank=0, batch_size=ramp_of(*sizes, ends=(1,)), micro_batch_size=1
            )
