"""One process and nothing of tedlab's but the layers: torch's own optimizer on plain tensors, as the judge."""

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from tedlab import Topology
from tedlab.optim.bucket import local
from tests.lightning.training import BATCH, DATA, STEPS, Mixture, world_size


class Seeded(Mixture):
    """Plain layers, too, begin alike in every process and run, whatever drew numbers before."""

    def configure_model(self) -> None:
        torch.manual_seed(0)
        super().configure_model()


class Plain:
    """The module's parameters as plain leaves, to which its gradients are handed.

    Args:
        make: the module.
        optimizer: from leaves by name.
    """

    def __init__(
        self,
        optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer],
        make: Callable[[], Mixture],
    ) -> None:
        self.module = make()
        self.module.trainer = SimpleNamespace(strategy=SimpleNamespace(topology=Topology.single("cpu")))  # type: ignore[assignment]
        torch.set_default_dtype(torch.float64)
        try:
            self.module.configure_model()
        finally:
            torch.set_default_dtype(torch.float32)
        self.module.double()
        self.leaves = {name: nn.Parameter(local(p).clone()) for name, p in self.module.named_parameters()}
        self.optimizer = optimizer(self.leaves)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.leaves.items())

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for name, p in self.module.named_parameters():
            if p.grad is not None:
                new, leaf = local(p.grad).clone(), self.leaves[name]
                leaf.grad = new if leaf.grad is None else leaf.grad + new
                p.grad = None

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, p in self.module.named_parameters():
                local(p).copy_(self.leaves[name])

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: leaf.detach().clone() for name, leaf in self.leaves.items()}


def batches(epochs: int, micro_batches: int = 1) -> Iterator[list[Tensor]]:
    size = BATCH // micro_batches
    for _ in range(epochs):
        for start in range(0, STEPS * BATCH, size):
            yield [t[start : start + size].double() for t in DATA.tensors]


def ordered() -> DataLoader:
    """What :func:`batches` has, divided over data ranks; Lightning would shuffle it."""
    size, tensor = world_size(), min(2, world_size())
    data = size // tensor
    sampler = DistributedSampler(DATA, data, int(os.environ["RANK"]) // tensor, shuffle=False)
    return DataLoader(DATA, BATCH // data, sampler=sampler)


def adamw(leaves: dict[str, nn.Parameter]) -> Any:
    """What ``Mixture.configure_optimizers`` makes."""
    return torch.optim.AdamW(leaves.values(), 0.01, eps=1e-5)
