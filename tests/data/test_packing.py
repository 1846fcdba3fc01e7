import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tedlab.data.packing import BestFitSamples, PackedSamples, pieces_of


def test_samples_overlap_by_the_one_token_that_is_target_and_then_input():
    samples = PackedSamples(np.arange(11, dtype=np.uint8), 3)
    assert [s.tolist() for s in samples] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_samples_are_int64_whatever_the_file_holds(dtype):
    top = np.iinfo(dtype).max
    sample = PackedSamples(np.array([0, top, 1], dtype=dtype), 2)[0]
    assert sample.dtype == torch.int64
    assert sample.tolist() == [0, top, 1]


@pytest.mark.parametrize(("tokens", "length"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_a_tail_too_short_for_a_window_is_left_out(tokens, length):
    assert len(PackedSamples(np.zeros(tokens, dtype=np.uint8), 4)) == length


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_out_of_range_is_refused(index):
    with pytest.raises(IndexError, match=f"sample {index} of 2"):
        PackedSamples(np.zeros(9, dtype=np.uint8), 4)[index]


def test_a_sample_is_a_copy_that_may_be_written_to(tmp_path):
    np.arange(5, dtype=np.uint8).tofile(tmp_path / "t.bin")
    tokens = np.memmap(tmp_path / "t.bin", dtype=np.uint8, mode="r")
    PackedSamples(tokens, 4)[0].zero_()
    assert tokens.tolist() == [0, 1, 2, 3, 4]


def documents(*sizes):
    return np.concatenate([np.r_[np.arange(1, n), 0] for n in sizes]).astype(np.uint8)


def test_best_fit_puts_documents_whole_where_they_leave_the_least_room():
    samples = BestFitSamples(documents(3, 7, 5, 2, 4), 0, 7)  # of 8 tokens
    assert [sample.tolist() for sample in samples] == [
        [1, 2, 3, 4, 5, 6, 0, -1],
        [1, 2, 3, 4, 0, 1, 2, 0],
        [1, 2, 3, 0, 1, 0, -1, -1],
    ]


def test_best_fit_cuts_what_is_too_long_and_learns_each_pair_once():
    tokens = np.r_[np.arange(1, 20), 0].astype(np.uint8)
    pairs = []
    for sample in BestFitSamples(tokens, 0, 4):
        filled = sample[sample >= 0].tolist()
        pairs += itertools.pairwise(filled)
    assert sorted(pairs) == sorted(zip(tokens.tolist(), tokens[1:].tolist(), strict=False))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(2, 20))
def test_best_fit_holds_every_pair_of_every_document_once(sizes, length):
    tokens = documents(*sizes)
    samples = BestFitSamples(tokens, 0, length)
    assert all(len(sample) == length + 1 for sample in samples)
    held = sorted((start + n) for sample in samples.samples for start, size in sample for n in range(size - 1))
    ends = set(np.cumsum(sizes) - 1)
    assert held == [n for n in range(len(tokens) - 1) if n not in ends]
    assert all(sum(piece.tokens for piece in sample) <= length + 1 for sample in samples.samples)
    used = sum(piece.tokens for sample in samples.samples for piece in sample)
    assert len(samples) <= 1 + 2 * used / (length + 1)  # of any two samples one is at least half full


def test_best_fit_of_no_documents_has_no_samples():
    assert len(BestFitSamples(np.zeros(0, dtype=np.uint8), 0, 4)) == 0
    assert len(BestFitSamples(np.zeros(9, dtype=np.uint8), 0, 4)) == 0  # of one token each, in which is no pair


def test_a_last_document_without_a_separator_counts():
    assert [piece.tokens for piece in pieces_of(np.array([1, 0, 2, 3], dtype=np.uint8), 0, 8)] == [2, 2]
