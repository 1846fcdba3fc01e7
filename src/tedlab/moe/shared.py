"""Shared experts, which every token goes to, beside those that a router chooses.

Several of the same width are one feed-forward layer that is as wide as all together. It is divided over the tensor
group like any dense layer and takes no part in the exchange of tokens; its collectives have tags of their own,
``shared.…``: they sum tokens, those of routed experts slots or rows, in another process than the token's.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from tedlab.degrees import ParallelDegrees, check_divides
from tedlab.nn import FeedForward, FeedForwardSpec, ShardedModule
from tedlab.spec import Init, Layout, MicroBatch, ParameterSpec, Sites, Spec, Work, WorkingSet
from tedlab.topology import Topology


@dataclass(frozen=True)
class SharedGateSpec(Spec):
    """Describes a :class:`SharedGate`."""

    hidden: int
    init: Init

    def own(self) -> Iterator[ParameterSpec]:
        yield ParameterSpec("weight", (1, self.hidden), self.init, own_tokens=True)

    def flops(self, length: int) -> Counter[str]:
        return Counter(shared=2 * self.hidden)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        if b.mixed:
            yield b.moved(b.outside * self.hidden, b.parameter, b.compute)
        yield b.product(b.outside, self.hidden, 1)
        if not stop:
            yield b.moved(2 * b.outside * self.hidden)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        for passes in (3, 2, 2):  # gradients of both factors, and the sum over features of one
            yield b.moved(passes * b.outside * self.hidden)
        yield from b.product_backward(b.outside, self.hidden, 1)
        yield b.moved(3 * b.outside * self.hidden, b.parameter)  # adds the tokens' gradients

    def saved(self, b: MicroBatch) -> int:
        """Counts the result that it weights, its weight and, if tokens are converted, these."""
        features = self.hidden * (2 if b.mixed else 1)
        return (b.outside * (features + 1) + (self.hidden if b.mixed else 0)) * b.compute.itemsize


@dataclass(frozen=True)
class SharedSpec(FeedForwardSpec):
    """Describes :class:`SharedExperts`, as the feed-forward layer that they are together.

    Attributes:
        weighted: Whether each token's result is weighted by a gate.
    """

    parts = ("up", "down", "gate")
    weighted: bool = False

    @property
    def gate(self) -> SharedGateSpec | None:
        return SharedGateSpec(self.hidden, self.init) if self.weighted else None

    def check(self, degrees: ParallelDegrees) -> None:
        check_divides("the width of all shared experts", self.ffn, "parallel.tensor", degrees.tensor)

    def sites(self, layout: Layout) -> Sites:
        # The gate's gradient needs the sum over tensor ranks, which otherwise nothing reads again.
        return Spec.sites(self, layout) if self.weighted else super().sites(layout)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        yield from super().forward(b, dead, stop and not self.weighted)
        if self.gate is not None:
            yield from self.gate.forward(b, dead, stop)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        if self.gate is not None:
            yield from self.gate.backward(b)
        yield from super().backward(b)

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        for moment in super().working_sets(b, recomputed):
            yield moment._replace(name="shared experts")


class SharedGate(ShardedModule):
    """The sigmoid of the product of a token with a vector (Qwen2-MoE)."""

    def __init__(self, spec: SharedGateSpec, topology: Topology) -> None:
        super().__init__()
        self.build(spec, topology)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens (…, H) to their weights (…, 1)."""
        return F.linear(x, self.local("weight")).sigmoid()


class SharedExperts(FeedForward):
    """A feed-forward layer, and the gate that weights each token's result, if there is one."""

    def __init__(self, spec: SharedSpec, topology: Topology) -> None:
        super().__init__(spec, topology)
        self.gate = None if spec.gate is None else SharedGate(spec.gate, topology)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.first(x), x)

    def finish(self, h: Tensor, x: Tensor) -> Tensor:
        """Returns what :meth:`forward` does of the tokens ``x``, of which ``h`` are the features of :meth:`first`."""
        y = self.second(h)
        return y if self.gate is None else y * self.gate(x)
