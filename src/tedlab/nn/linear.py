"""Linear layers divided over the tensor group, by output features (column) or input features (row), or undivided."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from tedlab.comm import matmul_into
from tedlab.nn.region import enter_sites, leave_sites, tensor_region
from tedlab.nn.sharded import ShardedModule
from tedlab.spec import Fused, Init, Layout, MicroBatch, ParameterSpec, Sites, Spec, Work
from tedlab.topology import Topology


@dataclass(frozen=True)
class LinearSpec(Spec):
    """Describes a linear layer.

    Attributes:
        in_features, out_features: Global sizes of the last dimension of input and output.
        tag: Begins the tags of its collectives.
        init: Initial weights; the bias starts at zero.
        bias: Whether there is a bias.
        alternating: Output features of each of several matrices before those of the next, see :class:`Fused`.
    """

    in_features: int
    out_features: int
    tag: str
    init: Init
    bias: bool = True
    alternating: tuple[int, ...] = field(default=(), kw_only=True)

    @property
    def fused(self) -> Fused | None:
        """How its matrices are fused, if there are several."""
        return Fused(0, self.alternating) if self.alternating else None

    def flops(self, length: int) -> Counter[str]:
        return Counter({self.tag: 2 * self.in_features * self.out_features})

    def widths(self, b: MicroBatch) -> tuple[int, int]:
        """Returns the numbers of input and output features of this process's part."""
        raise NotImplementedError

    def saved(self, b: MicroBatch) -> int:
        """Counts the input, and the weights if they are converted."""
        k, n = self.widths(b)
        return (b.tokens * k + (k * n if b.mixed else 0)) * b.compute.itemsize


@dataclass(frozen=True)
class ColumnParallelSpec(LinearSpec):
    """Describes a :class:`ColumnParallelLinear`."""

    def own(self) -> Iterator[ParameterSpec]:
        shape = self.out_features, self.in_features
        yield ParameterSpec("weight", shape, self.init, {"tensor": 0}, fused=self.fused, fan_in=1)
        if self.bias:
            yield ParameterSpec("bias", (self.out_features,), divided={"tensor": 0}, decayed=False)

    def sites(self, layout: Layout) -> Sites:
        return enter_sites(self.tag, self.in_features, layout)

    def widths(self, b: MicroBatch) -> tuple[int, int]:
        return self.in_features, self.out_features // b.tensor

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        k, n = self.widths(b)
        if b.mixed:  # what made the input writes it in this dtype if they are compiled
            yield b.moved(k * n if b.compiled else b.outside * k + k * n, b.parameter, b.compute)
        if b.layout.sequence:  # reorders by position
            yield b.moved(2 * b.tokens * k)
        yield b.product(b.tokens, k, n)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        k, n = self.widths(b)
        yield from b.product_backward(b.tokens, k, n)
        if self.bias:
            yield b.moved(b.tokens * n)
        if b.layout.sequence:
            yield b.moved(2 * b.tokens * k)


class ColumnParallelLinear(ShardedModule):
    """Computes ``x @ Wᵀ + b`` with the output features, a multiple of the tensor degree, divided over its group."""

    def __init__(self, spec: ColumnParallelSpec, topology: Topology) -> None:
        super().__init__()
        self.region = tensor_region(topology, spec.tag)
        self.build(spec, topology)

    def forward(self, x: Tensor) -> Tensor:
        """Maps activations outside (B, S, in_features) to this rank's part (B, S, out_features / T)."""
        return self.inside(self.region.enter(x))

    def inside(self, x: Tensor) -> Tensor:
        """Does the same for activations that have entered the region already."""
        return F.linear(x, self.local("weight"), self.local("bias") if "bias" in self.specs else None)


@dataclass(frozen=True)
class ReplicatedSpec(LinearSpec):
    """Describes a :class:`ReplicatedLinear`."""

    def own(self) -> Iterator[ParameterSpec]:
        shape = self.out_features, self.in_features
        yield ParameterSpec("weight", shape, self.init, own_tokens=True, fused=self.fused, fan_in=1)
        if self.bias:
            yield ParameterSpec("bias", (self.out_features,), own_tokens=True, decayed=False)

    def widths(self, b: MicroBatch) -> tuple[int, int]:
        return self.in_features, self.out_features

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        k, n = self.widths(b)
        if b.mixed:
            yield b.moved(k * n, b.parameter, b.compute)
        yield b.product(b.outside, k, n)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        yield from b.product_backward(b.outside, *self.widths(b))
        if self.bias:
            yield b.moved(b.outside * self.out_features)

    def saved(self, b: MicroBatch) -> int:
        k, n = self.widths(b)
        return (b.outside * k + (k * n if b.mixed else 0)) * b.compute.itemsize


class ReplicatedLinear(ShardedModule):
    """Computes ``x @ Wᵀ + b`` of activations outside, of which each tensor rank makes all features of what it holds."""

    def __init__(self, spec: ReplicatedSpec, topology: Topology) -> None:
        super().__init__()
        self.build(spec, topology)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, S, in_features) to (B, S, out_features)."""
        return F.linear(x, self.local("weight"), self.local("bias") if "bias" in self.specs else None)


@dataclass(frozen=True)
class RowParallelSpec(LinearSpec):
    """Describes a :class:`RowParallelLinear`."""

    def own(self) -> Iterator[ParameterSpec]:
        yield ParameterSpec("weight", (self.out_features, self.in_features), self.init, {"tensor": 1}, fan_in=1)
        if self.bias:  # replicated, since it is added once, to the sum
            yield ParameterSpec("bias", (self.out_features,), decayed=False)

    def sites(self, layout: Layout) -> Sites:
        return leave_sites(self.tag, self.out_features, layout)

    def widths(self, b: MicroBatch) -> tuple[int, int]:
        return self.in_features // b.tensor, self.out_features

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        k, n = self.widths(b)
        if b.mixed:
            yield b.moved(k * n, b.parameter, b.compute)
        if f"{self.tag}.reduce" not in dead:
            yield b.product(b.tokens, k, n)
            if b.layout.sequence:
                yield b.moved(2 * b.tokens * n)
        if self.bias and not b.compiled:
            yield b.moved(2 * b.outside * n)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        k, n = self.widths(b)
        if b.mixed:
            yield b.moved(b.outside * n, *(() if b.compiled else (b.parameter,)), b.compute)
        if b.layout.sequence:
            yield b.moved(2 * b.tokens * n)
        if self.bias:
            yield b.moved(b.tokens * n)
        yield from b.product_backward(b.tokens, k, n)


class RowParallelLinear(ShardedModule):
    """Computes ``x @ Wᵀ + b`` with the input features, a multiple of the tensor degree, divided over its group."""

    def __init__(self, spec: RowParallelSpec, topology: Topology) -> None:
        super().__init__()
        self.region, self.tag = tensor_region(topology, spec.tag), spec.tag
        self.build(spec, topology)

    def forward(self, x: Tensor) -> Tensor:
        """Maps this rank's part (B, S, in_features / T) to activations outside (B, S, out_features)."""
        return self.region.leave(
            matmul_into(x, self.local("weight").mT, f"{self.tag}.reduce"),
            self.local("bias") if "bias" in self.specs else None,
        )
