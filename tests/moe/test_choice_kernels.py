"""The Triton kernel chooses what ``choice.py`` does, on a GPU if there is one, otherwise in an interpreter."""

import pytest

from tests.moe.kernels import printed_by


@pytest.mark.slow
def test_the_kernel_chooses_as_plain_torch_does() -> None:
    differing = printed_by("tests.moe.choice_kernels_errors", failing="")
    assert len(differing) == 7 * 2 * 2 + 1
    assert not {name: tokens for name, tokens in differing.items() if tokens}
