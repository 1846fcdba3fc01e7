"""Shared experts, which every token goes to, beside those that a router chooses.

Several of the same width are one feed-forward layer that is as wide as all together. It is divided over the tensor
group like any dense layer and takes no part in the exchange of tokens; its collectives have tags of their own,
``shared.…``: they sum tokens, those of routed experts slots or rows, in another process than the token's.

Their result is added to that of the routed experts, or weighted first (``moe.shared.combine``): by the coefficients of
ScMoE, which are functions of the token that the shared experts read.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from tedlab.config import SharedCombine
from tedlab.degrees import ParallelDegrees, check_divides
from tedlab.nn import FeedForward, FeedForwardSpec, ShardedModule
from tedlab.spec import Init, Layout, MicroBatch, ParameterSpec, Sites, Spec, Work, WorkingSet
from tedlab.topology import Topology


@dataclass(frozen=True)
class SharedGateSpec(Spec):
    """Describes a :class:`SharedGate`.

    Attributes:
        weights: The number of weights: 1 of the shared experts, or 2 of these and of the routed ones.
    """

    hidden: int
    init: Init
    weights: int = 1

    def own(self) -> Iterator[ParameterSpec]:
        yield ParameterSpec("weight", (self.weights, self.hidden), self.init, own_tokens=True, fan_in=1)

    def flops(self, length: int) -> Counter[str]:
        return Counter(shared=2 * self.weights * self.hidden)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        if b.mixed:
            yield b.moved(b.outside * self.hidden, b.parameter, b.compute)
        yield b.product(b.outside, self.hidden, self.weights)
        if not stop:
            yield b.moved(2 * self.weights * b.outside * self.hidden)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        for passes in (3, 2, 2) * self.weights:  # gradients of both factors, and the sum over features of one
            yield b.moved(passes * b.outside * self.hidden)
        yield from b.product_backward(b.outside, self.hidden, self.weights)
        yield b.moved(3 * b.outside * self.hidden, b.parameter)  # adds the tokens' gradients

    def saved(self, b: MicroBatch) -> int:
        """Counts the results that it weights, their weights and, if tokens are converted, these."""
        features = self.weights * (self.hidden + 1) + (self.hidden if b.mixed else 0)
        return (b.outside * features + (self.weights * self.hidden if b.mixed else 0)) * b.compute.itemsize


@dataclass(frozen=True)
class SharedSpec(FeedForwardSpec):
    """Describes :class:`SharedExperts`, as the feed-forward layer that they are together.

    Attributes:
        combine: See ``moe.shared.combine``.
    """

    parts = ("up", "down", "gate")
    combine: str = SharedCombine.ADD.value

    @property
    def gate(self) -> SharedGateSpec | None:
        if self.combine == SharedCombine.ADD:
            return None
        return SharedGateSpec(self.hidden, self.init, 1 if self.combine == SharedCombine.CG1 else 2)

    def check(self, degrees: ParallelDegrees) -> None:
        check_divides("the width of all shared experts", self.ffn, "parallel.tensor", degrees.tensor)

    def sites(self, layout: Layout) -> Sites:
        # The gate's gradient needs the sum over tensor ranks, which otherwise nothing reads again.
        return super().sites(layout) if self.gate is None else Spec.sites(self, layout)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        yield from super().forward(b, dead, stop and self.gate is None)
        if self.gate is not None:
            yield from self.gate.forward(b, dead, stop)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        if self.gate is not None:
            yield from self.gate.backward(b)
        yield from super().backward(b)

    def halves(self, b: MicroBatch, backward: bool) -> tuple[list[Work], list[Work]]:
        """Returns the kernels of ``first`` and of ``finish`` of :class:`SharedExperts`, or of their adjoints."""
        features = b.tokens * self.ffn // b.tensor
        if backward:
            gate = [] if self.gate is None else [*self.gate.backward(b)]
            first = [*self.activate_backward(b, features), *self.up.backward(b)]
            return first, [*gate, *self.down.backward(b)]
        gate = [] if self.gate is None else [*self.gate.forward(b)]
        return [*self.up.forward(b), *self.activate(b, features)], [*self.down.forward(b), *gate]

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        for moment in super().working_sets(b, recomputed):
            yield moment._replace(name="shared experts")


class SharedGate(ShardedModule):
    """The weights that a token gives to results: a sigmoid of one product (cg1), or the softmax of two (cg2)."""

    def __init__(self, spec: SharedGateSpec, topology: Topology) -> None:
        super().__init__()
        self.build(spec, topology)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens (…, H) to the weights (…, 1) of shared experts, or (…, 2) of these and of routed ones."""
        logits = F.linear(x, self.local("weight"))
        # On GPUs autocast would make the softmax fp32, and with it all tokens.
        return logits.sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1).to(logits.dtype)


class Beside(NamedTuple):
    """What shared experts contribute.

    Attributes:
        y: Their weighted results (…, H).
        weight: The weights of routed experts' results (…, 1); None: they are 1.
    """

    y: Tensor
    weight: Tensor | None


class SharedExperts(FeedForward):
    """A feed-forward layer, and the gate that weights each token's result, if there is one."""

    def __init__(self, spec: SharedSpec, topology: Topology) -> None:
        super().__init__(spec, topology)
        self.gate = None if spec.gate is None else SharedGate(spec.gate, topology)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens (…, H) to their weighted results (…, H)."""
        return self.beside(x).y

    def beside(self, x: Tensor) -> Beside:
        """Maps tokens (…, H) to what they contribute to the routed experts' results."""
        return self.finish(self.first(x), x)

    def finish(self, h: Tensor, x: Tensor) -> Beside:
        """Returns what :meth:`beside` does of the tokens ``x``, of which ``h`` are the features of :meth:`first`."""
        y = self.second(h)
        if self.gate is None:
            return Beside(y, None)
        weights = self.gate(x)
        if weights.shape[-1] == 1:
            return Beside(y * weights, None)
        of_shared, of_routed = weights.split(1, -1)
        return Beside(y * of_shared, of_routed)
