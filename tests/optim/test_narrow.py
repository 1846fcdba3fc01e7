"""Moments in bf16: what rounding costs, and that it depends on nothing but the seed, the step and the element."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tedlab.optim import NarrowAdamW
from tedlab.optim.rounding import random_bits, to_bf16

EVERY = torch.arange(1 << 16, dtype=torch.int32)  # every draw once
fp32 = st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: abs(x) > 2.0**-100)


def neighbours(value: float) -> tuple[float, float]:
    """The numbers of bf16 around one of fp32, that nearer to zero first."""
    bits = torch.tensor(value).view(torch.int32) & -(1 << 16)
    below, above = bits.view(torch.float32), (bits + (1 << 16)).view(torch.float32)
    return below.item(), (below if below == value else above).item()


@given(fp32)
def test_stochastic_rounding_has_no_bias_and_leaves_less_than_a_unit(value: float) -> None:
    below, above = neighbours(value)
    rounded = to_bf16(torch.full((len(EVERY),), value), EVERY).double()
    assert set(rounded.tolist()) <= {below, above}
    torch.testing.assert_close(rounded.mean(), torch.tensor(value, dtype=torch.float64), rtol=1e-12, atol=0)


@given(fp32)
def test_rounding_to_the_nearest_leaves_at_most_half_a_unit(value: float) -> None:
    below, above = neighbours(value)
    rounded = to_bf16(torch.tensor([value], dtype=torch.float64)).item()
    assert abs(rounded - value) == min(abs(below - value), abs(above - value))
    assert abs(rounded - value) <= 2.0**-8 * abs(value)


def test_what_is_not_finite_stays_so() -> None:
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1.5])
    for bits in (0, (1 << 16) - 1):
        rounded = to_bf16(values, torch.full((5,), bits, dtype=torch.int32)).float()
        torch.testing.assert_close(rounded, values, rtol=0, atol=0, equal_nan=True)


def test_bits_are_even_and_depend_on_seed_step_and_element_alone() -> None:
    numbers = torch.arange(1 << 18)
    one, two = random_bits(numbers, 3, seed=7)
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    assert torch.equal(random_bits(numbers[order], 3, seed=7)[0], one[order])
    others = [random_bits(numbers, 4, seed=7)[0], random_bits(numbers, 3, seed=8)[0], two]
    for bits in (one, *others):
        assert (bits.min() >= 0) & (bits.max() < 1 << 16)
        for place in range(16):  # of 2^18 fair coins, five standard deviations
            assert abs(((bits >> place) & 1).double().mean() - 0.5) < 5 * 0.5 / 2**9
    for other in (*others, one.roll(1)):
        related = torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1]
        assert abs(related) < 5 / 2**9


def problem(precision: torch.dtype = torch.float64) -> tuple[list[nn.Parameter], Tensor]:
    draw = torch.Generator().manual_seed(1)
    weights = [nn.Parameter(torch.randn(shape, generator=draw, dtype=precision)) for shape in ((20, 30), (7,))]
    return weights, torch.randn(607, generator=draw, dtype=precision)


def test_the_first_step_is_adamw_s_and_moments_are_its_rounded() -> None:
    (ours, _), (torchs, _) = problem(), problem()
    options = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    narrow, wide = NarrowAdamW(ours, **options), torch.optim.AdamW(torchs, **options)
    for p, q in zip(ours, torchs, strict=True):
        p.grad = q.grad = p.detach().sin()
    narrow.step()
    wide.step()
    for p, q in zip(ours, torchs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-15)
        for key in ("exp_avg", "exp_avg_sq"):
            found, exact = narrow.state[p][key], wide.state[q][key]
            assert found.dtype == torch.bfloat16
            assert ((found.double() - exact).abs() < 2.0**-7 * exact.abs()).all()


def after(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], target: Tensor, steps: int) -> Tensor:
    """The weights after steps of a noisy quadratic."""
    draw = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for p, part in zip(weights, target.split([p.numel() for p in weights]), strict=True):
            p.grad = p.detach() - part.view(p.shape) + 0.3 * torch.randn(p.shape, generator=draw, dtype=p.dtype)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in weights])


def test_weights_stay_near_those_of_fp32_moments() -> None:
    """After 300 steps of 607 weights, over the way that they went."""
    away: dict[str, float] = {}
    weights, target = problem(torch.float32)
    start = torch.cat([p.detach().flatten() for p in weights])
    options = {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.0}
    exact = after(torch.optim.AdamW(mine := copy.deepcopy(weights), **options), mine, target, 300)
    for rounding in ("stochastic", "nearest"):
        mine = copy.deepcopy(weights)
        found = after(NarrowAdamW(mine, rounding=rounding, **options), mine, target, 300)
        away[rounding] = ((found - exact).norm() / (exact - start).norm()).item()
    assert away["stochastic"] < 0.01  # measured: 0.0027, and 0.0038 to the nearest
    assert away["stochastic"] < away["nearest"] < 0.02


def test_a_second_moment_follows_a_smaller_gradient_only_if_rounding_is_stochastic() -> None:
    """With beta2 = 0.999 a step changes it by less than half a unit, which the nearest number forgets."""
    left: dict[str, float] = {}
    for rounding in ("stochastic", "nearest"):
        p = nn.Parameter(torch.zeros(4096))
        optimizer = NarrowAdamW([p], lr=0.0, betas=(0.9, 0.999), rounding=rounding)
        for step in range(1001):
            p.grad = torch.full_like(p, 1.0 if step == 0 else 0.0)
            optimizer.step()
        left[rounding] = optimizer.state[p]["exp_avg_sq"].double().mean().item()
    assert left["stochastic"] == pytest.approx(1e-3 * 0.999**1000, rel=0.02)
    assert left["nearest"] > 0.9e-3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rounding": "up"}, "rounding is up"),
        ({"seed": -1}, "seed is -1"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"eps": -1}, "eps"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=f"NarrowAdamW: {said}"):
        NarrowAdamW([nn.Parameter(torch.zeros(1))], **wrong)  # type: ignore[arg-type]
