"""``tile=fused`` computes what torch's Adam and AdamW compute in float64, to the rounding of the dtype it works in.

Errors are counted in epsilons of that dtype, relative to |parameter| + learning rate: a step adds to a parameter of the
one size a change of about the other. In float64, torch's own kernels, fused or not, differ by as much.
"""

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.optimizer import Temporaries
from tedlab import ParallelDegrees, Topology
from tedlab.optim import ShardedOptimizer, fused
from tests.pool import WorkerPool
from tests.test_parity import compare
from tests.training import Job, Layout, train

LR, DECAY, FACTOR, STEPS = 1e-2, 0.1, 0.37, 5
BOUND = 2.0 * STEPS  # epsilons; 3.5 was the largest seen of any kernel
SIZES = [1, 7, 1024, 3001, fused._TILE + 5]
CUDA = torch.cuda.is_available()

Step = Callable[..., None]


def numbers(size: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def errors(
    step: Step, kind: type[Adam], size: int, dtype: torch.dtype, half: torch.dtype | None, device: str = "cpu"
) -> dict[str, float]:
    """Largest error of parameters and moments, in epsilons, after a few steps beside torch's float64 ones."""
    exact = nn.Parameter(numbers(size, 0).double())
    optimizer = kind([exact], lr=LR, weight_decay=DECAY, betas=(0.9, 0.95))
    master = numbers(size, 0, dtype, device)
    rounded = None if half is None else master.to(half)
    state: dict[str, Any] = {}
    for seed in range(1, STEPS + 1):
        gradient = numbers(size, seed, half or dtype, device)
        exact.grad = gradient.cpu().double() * FACTOR
        optimizer.step()
        step(master, gradient, state, optimizer.param_groups[0], factor=FACTOR, rounded=rounded)
    if half is not None:
        check_rounded(rounded, master)
    assert state.keys() == optimizer.state[exact].keys()
    assert state["step"] == STEPS
    wanted = {"parameter": exact.detach(), **optimizer.state[exact]}
    got = {"parameter": master, **state}
    scales = {"parameter": wanted["parameter"].abs() + LR, "exp_avg": torch.ones(()), "exp_avg_sq": wanted["exp_avg_sq"]}
    epsilon = torch.finfo(dtype).eps
    return {
        name: ((got[name].cpu().double() - wanted[name]).abs() / scale / epsilon).max().item()
        for name, scale in scales.items()
    }


def check_rounded(rounded: Tensor, master: Tensor) -> None:
    if rounded.dtype == torch.bfloat16 and not CUDA and rounded.numel() == KERNEL_SIZE:
        torch.testing.assert_close(rounded, master.bfloat16(), rtol=2**-7, atol=0.0)
    else:
        assert torch.equal(rounded, master.to(rounded.dtype))
