"""What a layer states about itself, beside its forward: the facts that predictions, the optimizer and CAC work from.

A specification never runs a layer and is never run by one, so that a prediction and a measurement are independent.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args

from tedlab.config import CommOptions, Dedup, MoEConfig
from tedlab.degrees import GroupKind, ParallelDegrees

if TYPE_CHECKING:
    import torch

    from tedlab.comm import Operation
    from tedlab.comm.rows import Rows

# Rows that a mixture of experts moves, see ``comm/rows.py``; routers may decide how many there are.
Lent = Literal["lent", "borrowed"]  # rows of these are the weights of an expert
LENT = get_args(Lent)
Routed = Literal[
    "sent",
    "received",
    "computed",
    "gathered",
    "relayed",
    "passed",
    "choices_sent",
    "choices_relayed",
    "choices_received",
    "choices_gathered",
    Lent,
]
ROUTED = get_args(Routed)
RowCount = Literal["tokens", "dealt", "samples", "once", Routed]
Number = Literal["parameter", "compute", "precise", "index"]


@dataclass(frozen=True)
class Init:
    """Initial values: ``mean`` + ``std`` · standard normal."""

    mean: float = 0.0
    std: float = 0.0


class Fused(NamedTuple):
    """How one parameter holds several matrices, side by side.

    Attributes:
        dim: The dimension of the parameter along which they alternate.
        widths: How many rows (or columns) of each matrix come before those of the next, again and again.
    """

    dim: int
    widths: tuple[int, ...]


class Fans(NamedTuple):
    """How many numbers of its input a number of a matrix's output depends on, and how many there are of its output."""

    inwards: int
    outwards: int


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter of the whole model, and how processes divide it.

    Attributes:
        name: Name within its layer.
        shape: Global shape.
        init: Initial values.
        divided: Maps an axis of its mesh to the dimension divided along it; other axes replicate the parameter.
        mesh: ``dense`` or ``expert``, see ``topology.py``. Gradients are summed over its first axis.
        own_tokens: Whether each tensor rank uses it for its own tokens where the sequence is sharded.
        own_part: Whether each tensor rank uses it for its own features, or tokens, in any layout.
        decayed: Whether weight decay applies.
        units: The number of units, such as heads, that the dimension divided along ``tensor`` consists of. A unit stays
            whole: where there are more tensor ranks than units, each rank holds all of them and uses one. None: the
            dimension is divided by any degree.
        fused: How several matrices are fused in it, which an optimizer of matrices steps apart; None: it is one.
        fan_in: The dimension that the products with it sum over; None: it is added, multiplied or looked up.
    """

    name: str
    shape: tuple[int, ...]
    init: Init = Init()
    divided: Mapping[str, int] = field(default_factory=dict)
    mesh: Literal["dense", "expert"] = "dense"
    own_tokens: bool = False
    own_part: bool = False
    decayed: bool = True
    units: int | None = None
    fused: Fused | None = None
    fan_in: int | None = None

    @property
    def fans(self) -> Fans | None:
        """Fan-in and fan-out of the whole matrix, or of each of a stack; None: no product sums over it."""
        if self.fan_in is None:
            return None
        outwards = max(dim for dim in range(len(self.shape)) if dim != self.fan_in)
        return Fans(self.shape[self.fan_in], self.shape[outwards])

    @property
    def group(self) -> GroupKind:
        """The group that its gradient is summed over."""
        return "data" if self.mesh == "dense" else "expert_data"

    def partial(self, layout: "Layout") -> bool:
        """Tells whether the gradients of tensor ranks are parts of a sum, which is taken over their group as well."""
        own = self.own_part or self.shared(layout.degrees) or (self.own_tokens and layout.sequence)
        return layout.degrees.tensor > 1 and own

    def shared(self, degrees: ParallelDegrees) -> bool:
        """Tells whether there are more tensor ranks than units, so that each rank holds all and uses one."""
        return self.units is not None and self.units < degrees.tensor

    def placed(self, degrees: ParallelDegrees) -> Mapping[str, int]:
        """Returns :attr:`divided` without an axis along which these degrees do not divide it."""
        return {axis: dim for axis, dim in self.divided.items() if axis != "tensor" or not self.shared(degrees)}

    def parts(self, degrees: ParallelDegrees) -> int:
        """Returns the number of parts that it is divided into."""
        return prod(getattr(degrees, axis) for axis in self.placed(degrees))

    def elements(self, degrees: ParallelDegrees) -> int:
        """Returns the number of elements that one process holds."""
        return prod(self.shape) // self.parts(degrees)

    def local_shape(self, degrees: ParallelDegrees) -> tuple[int, ...]:
        """Returns the shape of what one process holds."""
        shape = [*self.shape]
        for axis, dim in self.placed(degrees).items():
            shape[dim] //= getattr(degrees, axis)
        return tuple(shape)


def decayed_by_name(name: str) -> bool:
    """Tells whether weight decay applies to a parameter without a specification: it spares biases and norms."""
    return not ("bias" in name or "norm" in name)


@dataclass(frozen=True)
class Layout:
    """How processes divide a model, and the toggles of communication that its collectives depend on.

    Two numbers say how tokens reach experts. ``deals`` tensor ranks exchange parts of a data rank's tokens (T, or 1 if
    they all exchange the same), and ``gathers`` processes that divide an expert gather what each of them received (T_e,
    or 1 if they all receive the same). In the paper's layouts both are T or both are 1. A folded layout (T_e ≠ T)
    always deals: an expert group may hold several ranks of a tensor group, and would receive a token from each.

    ===============================  =====  =======
    layout                           deals  gathers
    ===============================  =====  =======
    T_e = T, all exchange the same   1      1
    T_e = T, DTD or sequence         T      T
    T_e ≠ T                          T      T_e
    ===============================  =====  =======
    """

    degrees: ParallelDegrees
    options: CommOptions = field(default_factory=CommOptions)
    sliced: bool = False  # as routed experts see it where they slice the tokens, see ``moe.slice``

    @property
    def sequence(self) -> bool:
        """Whether each tensor rank holds its own positions."""
        return (self.degrees.sequence or self.sliced) and self.degrees.tensor > 1

    def inside(self, moe: MoEConfig) -> "Layout":
        """Returns the layout as routers and routed experts see it, which may slice what tensor ranks hold alike."""
        return replace(self, sliced=moe.sliced)

    @property
    def deals(self) -> int:
        """The number of tensor ranks that exchange parts of a data rank's tokens with other processes' experts."""
        return self.degrees.tensor if self._divided else 1

    @property
    def gathers(self) -> int:
        """The number of processes of an expert_tensor group of which each receives tokens of its own."""
        return self.degrees.expert_tensor if self._divided else 1

    @property
    def _divided(self) -> bool:
        return self.options.dtd or self.sequence or self.degrees.folded

    @property
    def own(self) -> bool:
        """Whether every process exchanges tokens of its own, rather than all tensor ranks the same."""
        return self.deals > 1 or self.gathers > 1

    @property
    def dealt(self) -> bool:
        """Whether tensor ranks hold the same tokens, of which each exchanges a part and gets back all results."""
        return self.deals > 1 and not self.sequence

    @cached_property
    def nodes(self) -> int:
        """Over how many nodes an expert group is divided, if processes exchange in two steps; 1: they do so in one.

        Raises:
            ValueError: If a group's nodes have unequal parts of it.
        """
        options = self.options
        if options.ranks_per_node is None or not options.by_node:
            return 1
        nodes = self.degrees.nodes(options.ranks_per_node)
        return (
            1 if nodes == self.degrees.expert else nodes
        )  # with one process on each node, all steps are between nodes

    def groups(self, rank: int) -> dict[GroupKind, range]:
        """Returns the global ranks of a rank's groups, see :meth:`tedlab.degrees.ParallelDegrees.groups`."""
        return self.degrees.groups(rank, self.nodes)

    @property
    def sizes(self) -> dict[GroupKind, int]:
        """The number of processes in a group of each kind."""
        return {kind: len(ranks) for kind, ranks in self.groups(0).items()}

    @property
    def returning(self) -> str:
        """The tag of the first exchange on the way back from experts."""
        if self.options.dedup == Dedup.GROUP:
            return "combine.reduce_scatter"
        return "combine.all_to_all" if self.nodes == 1 else "combine.in_node"

    @property
    def chunks(self) -> int:
        """Into how many chunks a mixture divides what processes exchange, if they do."""
        return self.options.chunks if self.degrees.expert > 1 else 1

    @property
    def scattered(self) -> bool:
        """Whether each process that gathers gets only the sums of its own tokens, by a reduce-scatter.

        Otherwise it gets all sums and drops others', in the paper's order of DTD, which only dealt tokens have.
        """
        return self.gathers > 1 and (self.options.fuse_reduce_scatter or not self.dealt)


@dataclass(frozen=True)
class Site:
    """A place where a layer calls a collective.

    Attributes:
        tag: Name of the collective.
        op: Its operation.
        kind: Its group.
        width: Number of elements in a row.
        rows: How many rows it moves: one per token or sample of a data rank's micro-batch, one per token that each of
            the tensor ranks is dealt, a single one, or those of a mixture.
        dtype: Which dtype it moves: that of parameters, of matrix products, of fp32 or better, or of indices.
        feeds: The only site that uses its result; ``end``: no later collective or weight of the block uses it.
        replicated: Whether all tensor ranks hold the same result, so that each may keep a part for all.
        result: Rows of an all-to-all's result if they differ from ``rows``.
        chunk: Number of rows that it moves at a time; None: all.
        parts: Number of calls that it divides them into, as equally as can be.
        recomputed: Whether a second forward pass reaches it.
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
    parts: int = 1
    recomputed: bool = True

    @property
    def adjoint(self) -> "Site":
        """The all-to-all of its gradient, which goes the other way."""
        return replace(self, rows=self.result or self.rows, result=self.rows)

    def steps(
        self, layout: "Layout", reaching: RowCount = "relayed", leaving: RowCount = "relayed"
    ) -> tuple["Site", ...]:
        """Returns the exchanges that an all-to-all with experts consists of: two if it goes by way of nodes.

        Args:
            layout: The layout.
            reaching: What of its rows reaches a process from nodes.
            leaving: What that process sends on inside its node.
        """
        if layout.nodes == 1:
            return (self,)
        stem = self.tag.removesuffix("all_to_all") if self.tag.endswith("all_to_all") else f"{self.tag}_"
        near = replace(self, tag=f"{stem}in_node", kind="expert_in_node")
        far = replace(self, tag=f"{stem}between_nodes", kind="expert_between_nodes")
        if self.tag.startswith("dispatch."):
            return replace(far, result=reaching, feeds=near.tag), replace(near, rows=leaving)
        return replace(near, result=leaving, feeds=far.tag), replace(far, rows=reaching)


class Sites(NamedTuple):
    """The collectives of a layer, in the order of its passes; those of the backward pass are adjoints."""

    forward: tuple[Site, ...] = ()
    backward: tuple[Site, ...] = ()

    @property
    def recomputed(self) -> tuple[Site, ...]:
        """The collectives that a second forward pass reaches."""
        return tuple(site for site in self.forward if site.recomputed)

    def then(self, later: "Sites") -> "Sites":
        """Returns the collectives of this layer followed by those of a later one."""
        return Sites(self.forward + later.forward, later.backward + self.backward)

    def present(self, layout: "Layout") -> "Sites":
        """Drops the collectives of groups of one process, which communicate nothing."""
        sizes = layout.sizes
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


class Kernel(NamedTuple):
    """Which kernel does a work, of which a cluster file may have rates by size.

    Attributes:
        name: A name of :data:`tedlab.predict.cluster.KERNELS`.
        size: Keys that a query may see, or rows of a group; None: the bytes that it moves.
        width: Features of a head, or the narrower side of an expert's matrix; None: it makes no difference.
    """

    name: str
    size: float | None = None
    width: int | None = None


class Work(NamedTuple):
    """The work of one kernel.

    Attributes:
        flops: FLOPs of matrix products and attention, for which a causal mask halves them; 0 for other kernels.
        bytes: Bytes read and written, counting each operand once.
        dtype: Dtype of the computation.
        kind: Kind of kernel.
        fresh: Bytes of results that are too large for a CPU's allocator to keep.
        kernel: Which kernel it is, if more than its kind is known.
    """

    flops: float
    bytes: float
    dtype: "torch.dtype"
    kind: Literal["gemm", "attention", "arithmetic", "movement"]
    fresh: float = 0.0
    kernel: Kernel | None = None


@dataclass(frozen=True)
class MicroBatch:
    """What a layer computes with in one process.

    Attributes:
        layout: Layout of the processes.
        tokens: Number of tokens of a data rank's micro-batch.
        length: Number of tokens of a sample.
        parameter: Dtype of parameters and of activations between layers.
        compute: Dtype of matrix products.
        precise: Dtype of what is computed in fp32 or better.
        rows: Rows that the layer moves between experts and other processes.
        fused: Whether kernels may gather, activate and weight rows in one pass over memory each.
        gpu: Whether the process has a GPU, for which torch has kernels that other devices have not.
        compiled: Whether a compiler makes one kernel of all that stands between products, attention and collectives: it
            reads once what these made, and writes once what they, or the backward pass, will read.
        past: Number of tokens of each sample before these, of which attention remembers what it needs.
        busy: How many of the process's experts have rows; None: all.
    """

    layout: Layout
    tokens: int
    length: int
    parameter: "torch.dtype"
    compute: "torch.dtype"
    precise: "torch.dtype"
    rows: "Rows"
    fused: bool = False
    gpu: bool = False
    compiled: bool = False
    past: int = 0
    busy: int | None = None

    @property
    def tensor(self) -> int:
        """The tensor degree."""
        return self.layout.degrees.tensor

    @property
    def outside(self) -> int:
        """The number of tokens that this process holds between layers."""
        return self.tokens // self.tensor if self.layout.sequence else self.tokens

    @property
    def mixed(self) -> bool:
        """Whether products are computed in another dtype than that of parameters."""
        return self.parameter != self.compute

    def moved(self, elements: float, *dtypes: "torch.dtype", kernel: str | None = None) -> Work:
        """Returns a memory-bound operation that moves ``elements`` of each dtype, by default of ``compute``.

        Args:
            elements: The number of elements.
            dtypes: Dtypes of the tensors that are read or written.
            kernel: The name of the kernel, if it is one of its own.
        """
        dtypes = dtypes or (self.compute,)
        moved, named = elements * sum(d.itemsize for d in dtypes), None if kernel is None else Kernel(kernel)
        return Work(0, moved, self.precise if named is None else dtypes[0], "arithmetic", kernel=named)

    def product(
        self, m: int, k: int, n: int, *, times: int = 1, precise: bool = False, kernel: Kernel | None = None
    ) -> Work:
        """Returns the work of ``times`` products of matrices (m, k) and (k, n)."""
        dtype, moved = self.precise if precise else self.compute, m * k + k * n + m * n
        return Work(times * 2 * m * k * n, times * moved * dtype.itemsize, dtype, "gemm", kernel=kernel)

    def product_backward(self, m: int, k: int, n: int) -> Iterator[Work]:
        """Yields the work of the gradients of both factors, of which the second is a weight."""
        yield self.product(m, n, k)
        yield self.product(k, m, n)
        if self.mixed:
            yield self.moved(k * n, self.parameter, self.compute)


class WorkingSet(NamedTuple):
    """A moment of a layer's backward pass at which memory may peak.

    Attributes:
        name: Name of the moment.
        new: Bytes of gradients just made.
        done: Bytes of gradients that later layers left.
        freed: Bytes of activations that are no longer needed.
        temporaries: Bytes of everything else.
    """

    name: str
    new: int = 0
    done: int = 0
    freed: int = 0
    temporaries: int = 0


class Spec:
    """Base of specifications: frozen dataclasses whose fields are the layer's arguments except its topology.

    Attributes:
        parts: Names of the layers that it consists of, in the order of their parameters; each may be None.
    """

    parts: ClassVar[tuple[str, ...]] = ()

    def children(self) -> Iterator[tuple[str, "Spec"]]:
        """Yields its parts, by name."""
        return ((name, part) for name in self.parts if (part := getattr(self, name)) is not None)

    def own(self) -> Iterator[ParameterSpec]:
        """Yields the parameters that belong to none of its parts."""
        return iter(())

    def parameters(self) -> Iterator[ParameterSpec]:
        """Yields all parameters, in the order of ``named_parameters()`` and by the same names."""
        return iter(self._parameters)

    @cached_property
    def _parameters(self) -> tuple[ParameterSpec, ...]:
        """Kept, because a plan asks for them a dozen times in each of thousands of estimates."""
        inner = (
            replace(parameter, name=f"{name}.{parameter.name}")
            for name, part in self.children()
            for parameter in part.parameters()
        )
        return (*self.own(), *inner)

    def check(self, degrees: ParallelDegrees) -> None:
        """Refuses sizes that the layer cannot have with these degrees.

        Raises:
            ValueError: If there is one; the message has the configuration's names and says what would do.
        """
        for _, part in self.children():
            part.check(degrees)

    def sites(self, layout: Layout) -> Sites:
        """Returns its collectives, including those of groups that may have one process."""
        together = Sites()
        for _, part in self.children():
            together = together.then(part.sites(layout))
        return together

    def flops(self, length: int) -> Counter[str]:
        """Returns model FLOPs of the forward pass per token of a sample of ``length`` tokens, by part of the model."""
        return sum((part.flops(length) for _, part in self.children()), Counter())

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        """Yields the kernels of a first or second forward pass.

        Args:
            b: What it computes with.
            dead: Tags of collectives whose input nobody needs, so that the product that would make it is left out.
            stop: Whether the pass ends as soon as it has computed all that the backward pass needs.

        Raises:
            ValueError: If the layer has no parts and does not say.
        """
        for part in self._parts():
            yield from part.forward(b, dead)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        """Yields the kernels of its backward pass."""
        for part in reversed(self._parts()):
            yield from part.backward(b)

    def _parts(self) -> list["Spec"]:
        parts = [part for _, part in self.children()]
        if not parts:
            raise ValueError(
                f"{type(self).__name__} does not state its kernels, without which time cannot be estimated: define its "
                "forward and backward as tedlab.spec.Spec describes them; `tedlab simulate` runs any model"
            )
        return parts

    def saved(self, b: MicroBatch) -> int:
        """Returns the bytes that its forward pass keeps for the backward pass."""
        return sum(part.saved(b) for _, part in self.children())

    def gradients(self, b: MicroBatch) -> int:
        """Returns the bytes of its parameters' gradients."""
        return sum(p.elements(b.layout.degrees) for p in self.parameters()) * b.parameter.itemsize

    def working_sets(self, b: MicroBatch, recomputed: bool) -> Iterator[WorkingSet]:
        """Yields the moments of its backward pass at which memory may peak, after a second forward pass if any."""
        return iter(())
