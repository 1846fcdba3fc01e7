"""The Triton kernels on rows compute what ``row_ops.py`` does, on a GPU if there is one, else in an interpreter."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tedlab import Topology
from tedlab.config import MoEConfig
from tedlab.moe import MoELayer, MoESpec, gather, row_ops
from tedlab.moe.grouped import Groups
from tedlab.moe.products import _warn_once, products, unfit
from tedlab.nn import FeedForwardSpec, Init, Nonlinearity, initialize
from tedlab.optim.bucket import local
from tests.moe.kernels import printed_by


@pytest.fixture
def single() -> Iterator[Topology]:
    yield Topology.single()
    dist.destroy_process_group()


@pytest.mark.slow
def test_kernels_are_as_far_from_float64_as_the_dtype_makes_them() -> None:
    errors = printed_by("tests.moe.row_kernels_errors", failing=" at a loop over a number given to a kernel")
    assert len(errors) == 2 * 3 * 2 * 13
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


def test_a_row_that_is_no_choice_s_leaves_all_weights_gradients_alone() -> None:
    draw = torch.Generator().manual_seed(3)
    y, grad = (torch.randn(rows, 5, generator=draw, dtype=torch.float64) for rows in (4, 2))
    gate = torch.rand(2, 2, generator=draw, dtype=torch.float64)
    choice, place = torch.tensor([3, 0, -1, -1]), torch.tensor([[1, -1], [-1, 0]])  # the last weight's row is the first
    leaves = y.clone().requires_grad_(), gate.clone().requires_grad_()
    expected = torch.autograd.grad(row_ops.combine(leaves[0], place, leaves[1], None, place), leaves, grad)
    for ours, theirs in zip(row_ops.combine_backward(grad, y, gate, choice), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


FUSED = SimpleNamespace(**vars(row_ops))  # the same operations, as if they were kernels
SHAPES = ((4, 8), (4, 3), (3, 8))  # of tokens, gates and biases


@pytest.mark.parametrize("layout", ["rows", "queues with gaps"])
def test_fused_gathers_and_sums_are_what_autograd_makes_of_plain_ones(layout: str, monkeypatch: Any) -> None:
    """Spread over rows or queues, activate, and merge: values and gradients of tokens, gates and biases."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    choice = order if layout == "rows" else torch.where(order % 3 == 1, -1, order)
    slot = torch.full((12,), -1).scatter_(0, order, torch.arange(12))
    slot[order[choice < 0]] = -1
    groups = Groups(torch.arange(12) // 4, torch.tensor([4, 8, 12], dtype=torch.int32), (4, 4, 4))
    found = []
    for rows in (row_ops, FUSED):
        monkeypatch.setattr(gather, "row_functions", lambda kernel, x, rows=rows: rows)
        draw = torch.Generator().manual_seed(2)
        leaves = [torch.randn(shape, generator=draw).double().requires_grad_() for shape in SHAPES]
        x, gates, bias = leaves
        routing: Any = SimpleNamespace(slot_TK=slot.view(4, 3), gate_TK=gates, choice_EC=choice)
        h = gather.activate_rows(gather.spread_choices(x, routing), bias, groups, Nonlinearity("swiglu"), "auto")
        y = gather.merge_choices(h, routing)
        y.square().sum().backward()
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("activation", "bias"), [("gelu", True), ("swiglu", True), ("swiglu", False)])
def test_experts_with_a_capacity_compute_by_kernels_what_they_do_without(
    activation: str, bias: bool, single: Topology, monkeypatch: Any
) -> None:
    """Some choices are dropped, and some slots are empty."""
    monkeypatch.setattr(gather, "row_functions", lambda kernel, x: row_ops if kernel == "torch" else FUSED)
    found = []
    for kernel in ("auto", "triton"):
        config = MoEConfig(num_experts=4, top_k=2, kernel=kernel, capacity_factor=0.8, capacity_multiple=1)
        expert = FeedForwardSpec(3, 5, Init(std=1.0), Init(std=0.5), activation, bias)
        layer = MoELayer(MoESpec(expert, config), single).double()
        initialize(layer, seed=3)
        draw = torch.Generator().manual_seed(0)
        for p in layer.experts.parameters():
            local(p).copy_(torch.randn(local(p).shape, generator=draw, dtype=torch.float64))
        x = torch.randn(2, 9, 3, generator=draw, dtype=torch.float64).requires_grad_()
        y, report = layer(x)
        y.square().sum().backward()
        assert report.dropped > 0
        assert report.load.max() > report.load.min()
        assert layer.experts.compilable == (kernel == "auto")
        gradients = [p.grad.to_local() for p in layer.parameters()]  # type: ignore[union-attr]
        found.append([y.detach(), x.grad, *gradients])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


def test_a_kernel_that_does_not_take_the_rows_is_replaced_with_a_warning_that_says_why() -> None:
    assert "CUDA" in str(unfit(torch.float32, torch.device("cpu")))
    assert "float64" in str(unfit(torch.float64, torch.device("cuda")))
    _warn_once.cache_clear()  # another test of this process may have been warned
    with pytest.warns(UserWarning, match="moe.kernel=triton is not used here: it needs a CUDA GPU, these are on cpu"):
        assert products("triton", Nonlinearity(), torch.rand(2, 2)).rows is row_ops
    assert (
        products("auto", Nonlinearity(), torch.rand(2, 2)).rows is row_ops
    )  # without a warning: pytest would show it as an error
