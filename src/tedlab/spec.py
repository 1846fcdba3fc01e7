"""What a layer states about itself, beside its forward: the facts that predictions, the optimizer and CAC work from.

A specification never runs a layer and is never run by one, so that a prediction and a measurement are independent.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args

from tedlab.config import CommOptions
from tedlab.degrees import GroupKind, ParallelDegrees

if TYPE_CHECKING:
    import torch

    from tedlab.comm import Operation
    from tedlab.comm.rows import Rows

# Rows that a mixture of experts moves, see ``comm/rows.py``: of how many, routers may decide.
Routed = Literal["sent", "received", "computed", "gathered"]
ROUTED = get_args(Routed)
RowCount = Literal["tokens", "once", Routed]
Number = Literal["parameter", "compute", "precise", "index"]


@dataclass(frozen=True)
class Init:
    """Initial values: ``mean`` + ``std`` · standard normal."""

    mean: float = 0.0
    std: float = 0.0


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter of the whole model, and how processes divide it.

    Attributes:
        name: within its layer.
        shape: global shape.
        init: initial values.
        divided: mesh axis → the dimension that is divided along it; it is replicated along the other axes.
        mesh: ``dense`` or ``expert``, see ``topology.py``. Gradients are summed over its first axis.
        own_tokens: whether each tensor rank uses it for its own tokens where the sequence is sharded. Its gradients are
            then to be summed over the tensor group, too.
        decayed: whether weight decay pulls it towards zero.
    """

    name: str
    shape: tuple[int, ...]
    init: Init = Init()
    divided: Mapping[str, int] = field(default_factory=dict)
    mesh: Literal["dense", "expert"] = "dense"
    own_tokens: bool = False
    decayed: bool = True

    @property
    def group(self) -> GroupKind:
        """The group that its gradient is summed over."""
        return "data" if self.mesh == "dense" else "expert_data"

    def parts(self, degrees: ParallelDegrees) -> int:
        """How many parts it is divided into."""
        return prod(getattr(degrees, axis) for axis in self.divided)

    def elements(self, degrees: ParallelDegrees) -> int:
        """How many elements one process holds."""
        return prod(self.shape) // self.parts(degrees)


def decayed_by_name(name: str) -> bool:
    """Whether weight decay applies to a parameter that has no specification: not to biases and norms."""
    return not ("bias" in name or "norm" in name)


@dataclass(frozen=True)
class Layout:
    """How processes divide a model, and the toggles of communication that its collectives depend on."""

    degrees: ParallelDegrees
    options: CommOptions = field(default_factory=CommOptions)

    @property
    def sequence(self) -> bool:
        """Whether each tensor rank holds its own positions between layers."""
        return self.degrees.sequence and self.degrees.tensor > 1

    @property
    def sharers(self) -> int:
        """How many tensor ranks exchange tokens of their own with other processes' experts."""
        return self.degrees.tensor if self.options.dtd or self.sequence else 1

    @property
    def scattered(self) -> bool:
        """Whether each of these gets only the sums of its own tokens, by a reduce-scatter."""
        return self.sharers > 1 and (self.sequence or self.options.fuse_reduce_scatter)


@dataclass(frozen=True)
class Site:
    """A place where a layer calls a collective.

    Attributes:
        tag: its name.
        op: the operation.
        kind: the group.
        width: elements of a row that it moves.
        rows: how many it moves: one for each token of a data rank's micro-batch, one at all, or as a mixture does.
        dtype: of parameters, of matrix products, fp32 or better, or of indices.
        feeds: the site that alone uses its result; ``end``: no collective or weight of the block uses it any more.
        replicated: whether all tensor ranks hold the same result, so that each may keep a part for all.
        result: rows of an all-to-all's result, where these are others.
        chunk: rows that it moves at a time; None: all.
        recomputed: whether a second pass comes by.
    """

    tag: str
    op: "Operation"
    kind: GroupKind
    width: int
    rows: RowCount = "tokens"
    dtype: Number = "compute"
    feeds: str | None = None
    replicated: bool = False
    result: RowCount | None = None
    chunk: int | None = None
    recomputed: bool = True


class Sites(NamedTuple):
    """The collectives of a layer, in the order of its passes; those of the backward pass are adjoints."""

    forward: tuple[Site, ...] = ()
    backward: tuple[Site, ...] = ()

    @property
    def recomputed(self) -> tuple[Site, ...]:
        """Those that a second pass comes by."""
        return tuple(site for site in self.forward if site.recomputed)

    def then(self, later: "Sites") -> "Sites":
        """Of this layer and one behind it."""
        return Sites(self.forward + later.forward, later.backward + self.backward)

    def present(self, degrees: ParallelDegrees) -> "Sites":
        """Without those of groups of one process, which communicate nothing."""
        sizes = degrees.sizes
        there = {site.tag for site in self.forward if sizes[site.kind] > 1} | {"end"}
        feeds = {site.tag: site.feeds for site in self.forward}

        def next_present(tag: str | None) -> str | None:
            while tag is not None and tag not in there:
                tag = feeds[tag]
            return tag

        several = sizes["tensor"] > 1
        forward = (
            replace(site, feeds=next_present(site.feeds), replicated=site.replicated and several)
            for site in self.forward
            if site.tag in there
        )
        return Sites(tuple(forward), tuple(site for site in self.backward if sizes[site.kind] > 1))


class Work(NamedTuple):
    """What a kernel does.

    Attributes:
        flops: of matrix products and attention; a causal mask halves those of attention. 0 for all else.
        bytes: read and written, each operand once.
        dtype: that it computes in.
        kind: of kernel.
        fresh: bytes of results that are too large for a CPU's allocator to keep.
    """

    flops: float
    bytes: float
    dtype: "torch.dtype"
    kind: Literal["gemm", "attention", "arithmetic", "movement"]
    fresh: float = 0.0


@dataclass(frozen=True)
class MicroBatch:
    """What a layer computes with in one process.

    Attributes:
        layout: of the processes.
        tokens: of a data rank's micro-batch.
        length: tokens of a sample.
        parameter, compute, precise: dtypes of parameters and of activations between layers; of matrix products; of what
            is computed in fp32 or better.
        rows: that it moves between experts and other processes.
    """

    layout: Layout
    tokens: int
    length: int
    parameter: "torch.dtype"
    compute: "torch.dtype"
    precise: "torch.dtype"
    rows: "Rows"

    @property
    def tensor(self) -> int:
        """The tensor degree."""
        return self.layout.degrees.tensor

    @property
    def outside(self) -> int:
        """Tokens of this process between layers."""
        return self.tokens // self.tensor if self.layout.sequence else self.tokens

    @property
    def mixed(self) -> bool:
        """Whether products are computed in another dtype than parameters have."""
        return self.parameter != self.compute

    def moved(self, elements: float, *dtypes: "torch.dtype") -> Work:
        """An operation limited by memory that moves so many elements of each dtype; by default of ``compute``."""
        return Work(0, elements * sum(d.itemsize for d in dtypes or (self.compute,)), self.precise, "arithmetic")

    def product(self, m: int, k: int, n: int, *, times: int = 1, precise: bool = False) -> Work:
        """So many products of matrices (m, k) and (k, n)."""
        dtype = self.precise if precise else self.compute
        return Work(times * 2 * m * k * n, times * (m * k + k * n + m * n) * dtype.itemsize, dtype, "gemm")

    def product_backward(self, m: int, k: int, n: int) -> Iterator[Work]:
        """Gradients of both factors, of which the second is a weight."""
        yield self.product(m, n, k)
        yield self.product(k, m, n)
        if self.mixed:
            yield self.moved(k * n, self.parameter, self.compute)


class WorkingSet(NamedTuple):
    """A moment of a layer's backward pass that may be its fullest.

    Attributes:
        name: of it.
        new: bytes of gradients just made.
        done: bytes of those that the layers behind it left.
        freed: bytes of activations that are not needed any more.
        temporaries: bytes of everything else.
    """

    name: str
    new: int = 0
    done: int = 0
    freed: int = 0
    temporaries: int = 0


class Spec:
    """Base of specifications: frozen dataclasses whose fields are the arguments of the layer, but for its topology.

    Attributes:
        parts: names of the layers that it consists of, in the order of their parameters; each may be None.
    """

    parts: ClassVar[tuple[str, ...]] = ()

    def children(self) -> Iterator[tuple[str, "Spec"]]:
        """Its parts, by name."""
        return ((name, part) for name in self.parts if (part := getattr(self, name)) is not None)

    def own(self) -> Iterator[ParameterSpec]:
        """Parameters that belong to none of its parts."""
        return iter(())

    def parameters(self) -> Iterator[ParameterSpec]:
        """All parameters, in the order of ``named_parameters()`` and by the same names."""
        yield from self.own()
        for name, part in self.children():
            for parameter in part.parameters():
                yield replace(parameter, name=f"{name}.{parameter.name}")

    def sites(self, layout: Layout) -> Sites:
        """Its collectives, also those of groups that may have one process."""
        together = Sites()
        for _, part in self.children():
            together = together.then(part.sites(layout))
        return together

    def flops(self, length: int) -> Counter[str]:
        """Model FLOPs of the forward pass for each token of a sample of so many, by part of the model."""
        return sum((part.flops(length) for _, part in self.children()), Counter())

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        """The kernels of its forward pass, or of a second one.

        Args:
            b: that it computes.
            dead: collectives whose input nobody needs, so that the product that would make it is left out.
            stop: whether the pass ends as soon as everything is there that the backward pass needs.
        """
        for _, part in self.children():
            yield from part.forward(b, dead)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        """The kernels of its backward pass."""
        for _, part in reversed(tuple(self.children())):
            yield from part.backward(b)

    def saved(self, b: MicroBatch) -> int:
        """Bytes that its forward pass keeps for the backward pass."""
        return sum(part.saved(b) for _, part in self.children())

    def gradients(self, b: MicroBatch) -> int:
        """Bytes of the gradients of its parameters."""
        return sum(p.elements(b.layout.degrees) for p in self.parameters()) * b.parameter.itemsize

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        """Moments of its backward pass, which may follow a second forward pass, that can be the fullest."""
        return iter(())
