import numpy as np
import pytest

from tedlab.data.position import Position
from tedlab.data.sampler import MicroBatchSampler

BATCH = 16  # samples of one optimizer step
SAMPLES = range(16 * 5 + 7)  # five steps and a rest


def _sampler(ranks=1, rank=0, micro=2, seed=1, **kwargs):
    return MicroBatchSampler(
        SAMPLES, num_replicas=ranks, rank=rank, batch_size=BATCH, micro_batch_size=micro, seed=seed, **kwargs
    )


def _micro_batches(sampler):
    ids = list(sampler)
    return [tuple(ids[i : i + sampler.micro_batch_size]) for i in range(0, len(ids), sampler.micro_batch_size)]


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_together_see_in_order_what_one_process_sees(ranks, shuffle, epoch):
    one = _sampler(shuffle=shuffle)
    all_ranks = [_sampler(ranks, rank, shuffle=shuffle) for rank in range(ranks)]
    for sampler in (one, *all_ranks):
        sampler.set_epoch(epoch)
    dealt = [micro for together in zip(*map(_micro_batches, all_ranks), strict=True) for micro in together]
    assert dealt == _micro_batches(one)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", [1, 2])
def test_every_step_takes_the_same_samples_in_every_layout(ranks, micro):
    per_rank = BATCH // ranks
    ids = [list(_sampler(ranks, rank, micro)) for rank in range(ranks)]
    steps = [{i for rank in ids for i in rank[s * per_rank : (s + 1) * per_rank]} for s in range(5)]
    reference = list(_sampler(micro=16))
    assert steps == [set(reference[s * BATCH : (s + 1) * BATCH]) for s in range(5)]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_length_is_the_samples_of_this_rank_in_whole_steps(ranks):
    sampler = _sampler(ranks, ranks - 1)
    assert len(sampler) == len(list(sampler)) == 5 * BATCH // ranks


def test_an_epoch_reads_no_sample_twice_and_epochs_and_seeds_differ():
    sampler = _sampler()
    first = list(sampler)
    assert first == list(sampler)
    assert len(set(first)) == 5 * BATCH
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert set(second) != set(first)  # the rest left out is another one
    assert list(_sampler(seed=2)) not in (first, second)


def test_without_shuffling_the_order_is_the_identity():
    assert list(_sampler(shuffle=False)) == list(range(5 * BATCH))


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("steps", [0, 3, 5, 8, 10])
def test_a_resumed_run_reads_the_rest_of_an_uninterrupted_one(ranks, steps):
    def run(sampler, epochs):
        for epoch in epochs:
            sampler.set_epoch(epoch)
            yield from sampler

    for rank in range(ranks):
        uninterrupted = list(run(_sampler(ranks, rank), range(4)))
        resumed = _sampler(ranks, rank)
        resumed.start_at(Position().after(steps, BATCH, len(SAMPLES)).of_next_step(BATCH, len(SAMPLES)))
        assert list(run(resumed, range(steps // 5, 4))) == uninterrupted[steps * BATCH // ranks :]


def test_resuming_makes_the_epoch_current_before_set_epoch_is_called():
    reference, resumed = _sampler(), _sampler()
    reference.set_epoch(1)
    resumed.start_at(Position(1, 2 * BATCH))
    assert list(resumed) == list(reference)[2 * BATCH :]
    assert len(resumed) == 5 * BATCH  # Lightning counts the batches that were read before


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (2, 3), (3, 2)])
def test_from_anywhere_in_an_epoch_whole_steps_are_left(ranks, micro):
    """87 samples, of which 20 have been read: 67 are left, five steps of 12."""
    start, order = Position(3, 20), np.random.default_rng([1, 3]).permutation(87)
    samplers = [
        MicroBatchSampler(SAMPLES, num_replicas=ranks, rank=rank, batch_size=12, micro_batch_size=micro, seed=1)
        for rank in range(ranks)
    ]
    for sampler in samplers:
        sampler.start_at(start)
    dealt = [i for together in zip(*map(_micro_batches, samplers), strict=True) for batch in together for i in batch]
    assert dealt == order[20:80].tolist()
    assert start.after(4, 12, 87) == Position(3, 68)
    assert start.after(5, 12, 87) == Position(3, 80)
    assert start.after(5, 12, 87).of_next_step(12, 87) == Position(4, 0)
    assert start.after(5, 12, 87).of_next_step(7, 87) == Position(3, 80)
    assert start.after(5 + 7 + 2, 12, 87) == Position(5, 24)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: _sampler(ranks=3), r"batch_size=16 cannot be dealt evenly to 3 .* multiple of 3 x 2 = 6\."),
        (lambda: _sampler(micro=32), r"micro_batch_size=32: it must be a multiple of 1 x 32 = 32\."),
        (
            lambda: MicroBatchSampler(range(15), num_replicas=1, rank=0, batch_size=16, micro_batch_size=1),
            r"has 15 samples, fewer than one optimizer step takes \(data.batch_size=16\)",
        ),
    ],
)
def test_what_cannot_be_dealt_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
