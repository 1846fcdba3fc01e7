"""The Triton kernels on rows compute what ``row_ops.py`` does, on a GPU if there is one, else in an interpreter."""

import pytest
import torch

from tedlab.moe import row_ops
from tedlab.moe.products import products, unfit
from tedlab.nn import Nonlinearity
from tests.moe.kernels import printed_by


@pytest.mark.slow
def test_kernels_are_as_far_from_float64_as_the_dtype_makes_them() -> None:
    errors = printed_by("tests.moe.row_kernels_errors", failing=" at a loop over a number given to a kernel")
    assert len(errors) == 2 * 3 * 2 * 5
    for name, error in errors.items():
        assert error < (0.01 if "bfloat16" in name else 1e-5), name


@pytest.mark.parametrize("how", [Nonlinearity(), Nonlinearity("swiglu"), Nonlinearity("clamped_swiglu", 0.7)])
def test_the_backward_of_rows_is_that_of_autograd(how: Nonlinearity) -> None:
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(6, 8, generator=draw, dtype=torch.float64).requires_grad_()
    weight = torch.rand(6, generator=draw, dtype=torch.float64).requires_grad_()
    bias, expert = torch.randn(2, 8, generator=draw, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 1])
    weighted = weight.unsqueeze(1) * row_ops.hidden(z, bias, expert, how)
    grad = torch.randn(weighted.shape, generator=draw, dtype=torch.float64)
    grad_z, grad_weight = torch.autograd.grad(weighted, (z, weight), grad)
    ours = row_ops.hidden_backward(grad, z.detach(), bias, expert, weight.detach(), how)
    for a, b in zip(ours, (grad_z, weighted, grad_weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_a_kernel_that_does_not_take_the_rows_is_replaced_with_a_warning_that_says_why() -> None:
    assert "CUDA" in str(unfit(torch.float32, torch.device("cpu")))
    assert "float64" in str(unfit(torch.float64, torch.device("cuda")))
    with pytest.warns(UserWarning, match="moe.kernel=triton is not used here: it needs a CUDA GPU, these are on cpu"):
        assert products("triton", Nonlinearity(), torch.rand(2, 2)).rows is row_ops
    assert (
        products("auto", Nonlinearity(), torch.rand(2, 2)).rows is row_ops
    )  # without a warning: pytest would show it as an error
