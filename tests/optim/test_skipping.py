"""Every element-wise optimizer on shards does what it does on whole parameters, those without a gradient too."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from tedlab import ParallelDegrees, Topology
from tedlab.optim import Muon, ShardedOptimizer
from tedlab.optim.kinds import KNOWN
from tests.pool import WorkerPool

SHAPES = ((5,), (2, 3), (4,), (7, 2), (1,))  # 30 elements: shards of 15, which begin within a parameter
STEPS = 5


class Lion(Optimizer):
    """One that the user wrote (Chen et al., 2023)."""

    elementwise = True

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    p.sub_((0.9 * momentum + 0.1 * p.grad).sign(), alpha=group["lr"])
                    momentum.lerp_(p.grad, 0.01)


MAKE: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    **{kind.__name__: lambda p, kind=kind: kind(p, lr=0.05) for kind in KNOWN},  # type: ignore[misc]
    "SGD with momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "AdamW amsgrad": lambda p: AdamW(p, lr=0.05, weight_decay=0.1, amsgrad=True, foreach=True),
    "Adam fused": lambda p: Adam(p, lr=0.05, weight_decay=0.1, fused=True),
    "Adagrad started": lambda p: Adagrad(p, lr=0.05, initial_accumulator_value=0.5, lr_decay=0.1),
    "RMSprop centred": lambda p: RMSprop(p, lr=0.05, centered=True, momentum=0.9),
    "NAdam maximize": lambda p: NAdam(p, lr=0.05, maximize=True, decoupled_weight_decay=True, weight_decay=0.1),
    "Lion": Lion,
    "Muon": lambda p: Muon(
        [{"params": [x for x in p if x.dim() == 2]}, {"params": [x for x in p if x.dim() < 2], "matrix": False}],
        lr=0.05,
    ),
}


def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64)) for shape in SHAPES]


def gradient(step: int, index: int, shape: tuple[int, ...], rank: int) -> Tensor | None:
    """The first has one always, the second in odd steps, the third never, the fourth on one process in step 3."""
    if index == 2 or (index == 1 and step % 2 == 0) or (index == 3 and step == 3 and rank == 0):
        return None
    draw = torch.Generator().manual_seed(100 * step + 10 * index + rank)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def plain(name: str) -> list[Tensor]:
    params = parameters()
    optimizer = MAKE[name](params)
    for step in range(STEPS):
        for index, p in enumerate(params):
            parts = [gradient(step, index, tuple(p.shape), rank) for rank in range(2)]
            there = [part for part in parts if part is not None]
            p.grad = torch.stack(there).sum(0) / 2 if there else None
        optimizer.step()
    return [p.detach() for p in params]


def sharded(name: str, zero: bool, tile: int | None, reloaded: bool) -> list[Tensor]:
    """With ``reloaded`` a new optimizer takes over the state before each step."""
    topology, params = Topology(ParallelDegrees(2)), parameters()
    names = {p: str(index) for index, p in enumerate(params)}

    def make() -> ShardedOptimizer:
        return ShardedOptimizer(MAKE[name](params), topology.comm, names, zero=zero, tile=tile)

    optimizer = make()
    for step in range(STEPS):
        for index, p in enumerate(params):
            p.grad = gradient(step, index, tuple(p.shape), dist.get_rank())
        optimizer.reduce_gradients()
        optimizer.optimizer.step()
        if reloaded:
            state = optimizer.state_dict()
            assert all(not values or int(n) != 2 or name.startswith("Adagrad") for n, values in state["state"].items())
            optimizer.release()
            optimizer = make()
            optimizer.load_state_dict(state)
    return [p.detach().clone() for p in params]


def everything() -> dict[str, tuple[list[Tensor], list[list[Tensor]]]]:
    ways = [(True, None, False), (True, 4, True), (False, 3, False)]
    return {name: (plain(name), [sharded(name, *way) for way in ways]) for name in MAKE}


@pytest.fixture(scope="module")
def two(pool: WorkerPool) -> Any:
    return pool.run(2, everything)


@pytest.mark.parametrize("name", MAKE)
def test_parameters_without_a_gradient_are_left_alone_with_their_state(two: Any, name: str) -> None:
    for rank in two:
        expected, ways = rank[name]
        start = parameters()
        assert torch.equal(expected[2], start[2])
        assert not torch.equal(expected[1], start[1])
        for found in ways:
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


def hooked() -> tuple[list[str], Tensor, Tensor]:
    """Which hooks a step of many tiles calls, and how far it moves two parameters, of which one loses its gradient."""
    topology, params = Topology(ParallelDegrees(2)), parameters()
    names = {p: str(index) for index, p in enumerate(params)}
    optimizer = SGD(params, lr=1.0)
    called: list[str] = []

    def before(*_: Any) -> None:
        called.append("before")
        assert params[1].grad is not None
        params[1].grad.zero_()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    sharded = ShardedOptimizer(optimizer, topology.comm, names, zero=True, tile=4)
    for p in params:
        p.grad = torch.ones_like(p)
    sharded.reduce_gradients()
    optimizer.step()
    first, second = (start - p.detach() for p, start in zip(params[:2], parameters(), strict=False))
    return called, first.detach(), second.detach()


def test_hooks_on_the_step_run_once_and_see_gradients(pool: WorkerPool) -> None:
    for called, first, second in pool.run(2, hooked):
        assert called == ["before", "after"]
        torch.testing.assert_close(first, torch.ones(5, dtype=torch.float64))
        torch.testing.assert_close(second, torch.zeros(2, 3, dtype=torch.float64))
