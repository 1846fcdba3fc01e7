"""The stand-in for torch's kernels of norms on a GPU counts what they move, and so does the closed form."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tedlab.nn import NormSpec
from tedlab.nn.norm import FullNormSpec
from tedlab.predict.sim.norm import FusedNorm
from tedlab.predict.volumes import ClosedForm
from tests.moved import Moved
from tests.predict.sim.test_simulation import checked
from tests.predict.test_estimate import MANY, ONE, TODAY


def test_a_norm_is_read_twice_in_the_backward_pass_if_its_weight_trains() -> None:
    moved: list[tuple[list[int], int]] = []

    def count(operands: Sequence[Tensor], result: Tensor | None) -> None:
        moved.append(([tensor.numel() for tensor in operands], 0 if result is None else result.numel()))

    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    FusedNorm(count, lambda: False)(x, weight, 1e-5).sum().backward()
    assert moved == [([24], 24), ([24, 24], 24), ([24, 24], 0)]  # forward; x, dy and dx; x and dy for the weight
    moved.clear()
    FusedNorm(count, lambda: False)(x, weight.detach(), 1e-5).sum().backward()
    assert moved == [([24], 24), ([24, 24], 24)]


@pytest.mark.parametrize("compiled", [False, True])
def test_torch_has_no_kernel_for_inputs_in_another_dtype_than_the_weight(compiled: bool) -> None:
    """It composes RMSNorm of others then, which a compiler makes one of."""
    moved: list[int] = []
    norm = FusedNorm(lambda operands, result: moved.append(len(operands)), lambda: compiled)
    norm(torch.randn(3, 8, dtype=torch.bfloat16), torch.ones(8), 1e-5)
    assert len(moved) == compiled


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_the_closed_form_of_a_composed_norm_moves_what_torchs_operations_do() -> None:
    batch = ClosedForm(checked(*ONE, *TODAY, "trainer=gpu", "trainer.precision=bf16-mixed")).at()
    norm = FullNormSpec(256)
    x, weight = torch.randn(batch.tokens, 256, dtype=torch.bfloat16, requires_grad=True), torch.ones(256)
    with Moved() as forward:
        y = F.rms_norm(x, (256,), weight.requires_grad_(), 1e-5)
    with Moved() as backward:
        y.backward(torch.empty_like(y))
    assert sum(work.bytes for work in norm.forward(batch)) == pytest.approx(forward.bytes, rel=0.01)
    assert sum(work.bytes for work in norm.backward(batch)) == pytest.approx(backward.bytes, rel=0.01)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_closed_form_counts_the_same_passes(kind: str) -> None:
    batch = ClosedForm(checked(*MANY, *TODAY, "trainer=gpu", "trainer.precision=bf16-true")).at()
    norm, size = NormSpec(8, kind), batch.outside * 8 * 2
    assert sum(work.bytes for work in norm.forward(batch)) == 2 * size
    assert sum(work.bytes for work in norm.backward(batch)) == 5 * size
