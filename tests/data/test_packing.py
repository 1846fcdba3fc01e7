import numpy as np
import pytest
import torch

from tedlab.data.packing import PackedSamples


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
