"""The dense feed-forward layer, divided over the tensor group."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from tedlab.degrees import ParallelDegrees, check_divides
from tedlab.nn.activation import Nonlinearity, activate
from tedlab.nn.linear import ColumnParallelLinear, ColumnParallelSpec, RowParallelLinear, RowParallelSpec
from tedlab.spec import Init, Layout, MicroBatch, Sites, Spec, Work, WorkingSet
from tedlab.topology import Topology


@dataclass(frozen=True)
class FeedForwardSpec(Spec):
    """Describes a :class:`FeedForward`.

    Attributes:
        hidden: Model width.
        ffn: Inner width F, a multiple of the tensor degree.
        init, out_init: Initial weights of the first and of the second projection.
        activation: ``gelu``, ``swiglu`` or ``clamped_swiglu``.
        bias: Whether the projections have biases.
        limit: See :class:`tedlab.nn.Nonlinearity`.
        tag: Begins the tags of its collectives.
    """

    parts: ClassVar[tuple[str, ...]] = ("up", "down")
    hidden: int
    ffn: int
    init: Init
    out_init: Init
    activation: str = "gelu"
    bias: bool = True
    limit: float = 7.0
    tag: str = "feed_forward"

    @property
    def nonlinearity(self) -> Nonlinearity:
        """The activation and its bound."""
        return Nonlinearity(self.activation, self.limit)

    @property
    def gated(self) -> bool:
        """Whether the activation makes one feature of two."""
        return self.nonlinearity.gated

    @property
    def inner(self) -> int:
        """The number of features of the first projection, from which the activation makes ``ffn``."""
        return 2 * self.ffn if self.gated else self.ffn

    @property
    def up(self) -> ColumnParallelSpec:
        parts = (1, 1) if self.gated else ()
        return ColumnParallelSpec(self.hidden, self.inner, self.tag, self.init, self.bias, alternating=parts)

    @property
    def down(self) -> RowParallelSpec:
        return RowParallelSpec(self.ffn, self.hidden, self.tag, self.out_init, self.bias)

    def check(self, degrees: ParallelDegrees) -> None:
        check_divides("model.ffn", self.ffn, "parallel.tensor", degrees.tensor)

    def sites(self, layout: Layout) -> Sites:
        (*inner, last), backward = super().sites(layout)
        return Sites((*inner, replace(last, feeds="end")), backward)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        yield from self.up.forward(b)
        yield from self.activate(b, b.tokens * self.ffn // b.tensor)
        if not stop:
            yield from self.down.forward(b, dead)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        yield from self.down.backward(b)
        yield from self.activate_backward(b, b.tokens * self.ffn // b.tensor)
        yield from self.up.backward(b)

    def saved(self, b: MicroBatch) -> int:
        return super().saved(b) + self.kept * b.tokens * self.ffn // b.tensor * b.compute.itemsize

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        matrix = self.hidden * self.ffn // b.tensor * b.parameter.itemsize
        inner = b.tokens * self.inner // b.tensor * b.compute.itemsize
        yield WorkingSet("feed-forward layer", matrix, temporaries=matrix + inner)  # one matrix is transposed

    @property
    def kept(self) -> int:
        """How many numbers are kept for each that the activation makes: its input, and SwiGLU's SiLU."""
        return 1 if not self.gated else 2 if self.nonlinearity.clamped else 3

    def activate(self, b: MicroBatch, results: int) -> Iterator[Work]:
        """Yields the kernels of an activation with so many results."""
        passes: tuple[float, ...] = (2, 3) if self.gated else (2,)  # SiLU, product; or GELU
        if b.compiled:
            passes = (3,) if self.gated else (2,)
        elif self.nonlinearity.clamped:
            passes = (2, 2, 2, 3, 2, 2, 3)  # clamp, factor, sigmoid, product; clamp, sum; product
        for times in passes:
            yield b.moved(times * results)

    def activate_backward(self, b: MicroBatch, results: int) -> Iterator[Work]:
        """Yields the kernels of the gradient of an activation with so many results."""
        passes: tuple[float, ...] = (3, 3, 3, 4) if self.gated else (3,)  # both factors, SiLU, and together; or GELU
        if b.compiled:
            passes = (5,) if self.gated else (3,)
        elif self.nonlinearity.clamped:
            # Comparisons; clamps and sums; sigmoid and product; the slope of the gate, that of the linear part, both
            # together; the gradient, repeated, and its product with them.
            passes = (1.25, 2, 1.25, 2, 2, 2, 2, 2, 3, 3, 2, 2, 2, 2, 3, 2.25, 3, 2.25, 4, 3, 6)
        for times in passes:
            yield b.moved(times * results)


class FeedForward(nn.Module):
    """Linear, GELU, linear (GPT-3); or with SwiGLU (Shazeer, 2020) linear, SiLU of one half times the other, linear.

    See :func:`tedlab.nn.activate` for the clamped SwiGLU.

    The rows of SwiGLU's first projection are ordered by feature (gate and value of feature 0, then of feature 1, …), so
    that dividing the rows evenly divides them by features in every layout.
    """

    def __init__(self, spec: FeedForwardSpec, topology: Topology) -> None:
        super().__init__()
        self.nonlinearity = spec.nonlinearity
        self.up = ColumnParallelLinear(spec.up, topology)
        self.down = RowParallelLinear(spec.down, topology)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, S, H) to (B, S, H)."""
        return self.second(self.first(x))

    def first(self, x: Tensor) -> Tensor:
        """Maps (B, S, H) to this tensor rank's inner features, which are activated."""
        return activate(self.up(x), self.nonlinearity)

    def second(self, h: Tensor) -> Tensor:
        """Maps the features of :meth:`first` to (B, S, H)."""
        return self.down(h)
