"""The Triton kernels list what ``index_ops.py`` does, on a GPU if there is one, otherwise in an interpreter."""

import pytest

from tests.moe.kernels import printed_by


@pytest.mark.slow
def test_the_kernels_list_what_plain_torch_does() -> None:
    differing = printed_by("tests.moe.index_kernels_errors", failing="")
    assert len(differing) == 5 + 2 + 5 * 2
    assert not {name: numbers for name, numbers in differing.items() if any(numbers)}
