"""The experts of one process, computed together; each is divided over the expert-tensor group."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tedlab.comm import Issued, matmul_into, to_compute_dtype
from tedlab.comm.rows import Rows
from tedlab.config import ExpertKernel, LendPolicy, MoEConfig
from tedlab.degrees import ParallelDegrees, check_divides
from tedlab.moe.dispatch import DispatchSpec, OverlappingPath, SlotRegion, TokenPath, token_path
from tedlab.moe.gather import activate_rows, project_slots
from tedlab.moe.grouped import add_bias, grouped_matmul, native
from tedlab.moe.lending import TAG, lend, policy_of
from tedlab.moe.ragged import OverlappingRowPath, RaggedRows, RowPath, RowRegion, arrange, ragged_path
from tedlab.moe.router import Routing
from tedlab.nn import FeedForwardSpec, ShardedModule
from tedlab.registry import mixtures
from tedlab.spec import Fused, Init, Kernel, Layout, MicroBatch, ParameterSpec, Site, Sites, Spec, Work
from tedlab.topology import Topology


@dataclass(frozen=True)
class ExpertsSpec(Spec):
    """Describes :class:`Experts`, each of which is a feed-forward layer like ``expert``."""

    expert: FeedForwardSpec
    config: MoEConfig

    @property
    def num_experts(self) -> int:
        return self.config.num_experts

    @property
    def hidden(self) -> int:
        return self.expert.hidden

    def check(self, degrees: ParallelDegrees) -> None:
        width = "moe.ffn" if self.config.ffn else "model.ffn"
        by = "parallel.expert_tensor" if degrees.folded else "parallel.tensor"
        check_divides(width, self.expert.ffn, by, degrees.expert_tensor)
        check_divides("moe.num_experts", self.num_experts, "parallel.expert", degrees.expert)

    def own(self) -> Iterator[ParameterSpec]:
        one, number = self.expert, self.num_experts
        by_column, by_row = {"expert": 0, "expert_tensor": 2}, {"expert": 0, "expert_tensor": 1}
        fused = Fused(2, (1, 1)) if one.gated else None
        shape = number, one.hidden, one.inner
        yield ParameterSpec("up", shape, one.init, by_column, "expert", fused=fused, fan_in=1)
        yield ParameterSpec("down", (number, one.ffn, one.hidden), one.out_init, by_row, "expert", fan_in=1)
        if one.bias:
            biases = (("up_bias", one.inner, by_column), ("down_bias", one.hidden, {"expert": 0}))
            for name, width, divided in biases:
                yield ParameterSpec(name, (number, 1, width), Init(), divided, "expert", decayed=False)

    def sites(self, layout: Layout) -> Sites:
        if self.config.lend.policy == LendPolicy.NONE:
            return Sites()
        lent = Site(TAG, "all_to_all", "expert", self.elements(layout.degrees), "lent", result="borrowed")
        return Sites((lent,), (replace(lent, rows="borrowed"),))

    def elements(self, degrees: ParallelDegrees) -> int:
        """Returns the number of elements of one expert's parameters in one process."""
        return sum(p.elements(degrees) * degrees.expert for p in self.own()) // self.num_experts

    def flops(self, length: int) -> Counter[str]:
        """Counts one expert."""
        return Counter(experts=self.expert.flops(length).total())

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        """Yields the kernels; ``stop`` leaves out the second product."""
        here, rows, inner, width = self.here(b)
        if b.mixed:
            yield b.moved(here * self.hidden * (inner + width), b.parameter, b.compute)
        yield b.product(rows, self.hidden, inner, times=here, kernel=self.grouped(b, inner))
        if self.fused(b):
            yield b.moved(b.rows.computed * (inner + width), kernel="hidden")
        else:
            yield from self.expert.activate(b, b.rows.computed * width)
        if not stop:
            yield b.product(rows, width, self.hidden, times=here, kernel=self.grouped(b, width))

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        here, rows, inner, width = self.here(b)
        if self.expert.bias:
            yield b.moved(b.rows.computed * self.hidden)
        yield b.product(rows, self.hidden, width, times=here, kernel=self.grouped(b, width))
        yield b.product(self.hidden, rows, width, times=here, kernel=self.grouped(b, width, "grouped_weights"))
        if self.fused(b):
            yield b.moved(b.rows.computed * (2 * inner + width), kernel="hidden_backward")
        else:
            yield from self.expert.activate_backward(b, b.rows.computed * width)
        yield b.product(rows, inner, self.hidden, times=here, kernel=self.grouped(b, inner))
        yield b.product(inner, rows, self.hidden, times=here, kernel=self.grouped(b, inner, "grouped_weights"))
        if self.expert.bias:
            yield b.moved(b.rows.computed * inner)
        if b.layout.chunks > 1:  # adds up the gradients of weights
            yield b.moved(3 * (b.layout.chunks - 1) * here * self.hidden * (inner + width), b.parameter)
        if b.mixed:
            yield b.moved(here * self.hidden * (inner + width), b.parameter, b.compute)

    def saved(self, b: MicroBatch) -> int:
        """Counts inputs, both sides of the activation, weights if they are converted, and borrowed ones."""
        here, _, inner, width = self.here(b)
        weights = here * self.hidden * (inner + width) if b.mixed else 0
        weights += b.rows.borrowed * self.elements(b.layout.degrees)
        activating = inner if self.fused(b) else self.expert.kept * width
        return (b.rows.computed * (self.hidden + activating + width) + weights) * b.compute.itemsize

    def fused(self, b: MicroBatch) -> bool:
        """See :meth:`DispatchSpec.fused`."""
        return mixtures[self.config.dispatch].dispatch(self.hidden, self.config).fused(b)

    def grouped(self, b: MicroBatch, width: int, name: str = "grouped") -> Kernel | None:
        """Returns the kernel of products with all experts' matrices of this width, if one computes them together."""
        together = b.gpu and self.config.ragged and native(b.compute, self.hidden, width)
        here, *_ = self.here(b)
        return Kernel(name, b.rows.computed / here, min(self.hidden, width)) if together else None

    def here(self, b: MicroBatch) -> tuple[int, int, int, int]:
        """Returns the number of this process's experts, the rows of each, and its features around the activation.

        Experts without rows are left out where it is known how many these are.
        """
        here, expert = self.num_experts // b.layout.degrees.expert if b.busy is None else b.busy, self.expert
        divided = b.layout.degrees.expert_tensor
        return here, b.rows.computed // here, expert.inner // divided, expert.ffn // divided


class Experts(ShardedModule):
    """Base of mixtures, which apply to each token the experts that a router chose for it.

    Each way of doing so is a subclass; a configuration names those that are registered. One with a path of its own
    between tokens and experts derives from :class:`SlotExperts` or :class:`RowExperts` and sets ``path`` and ``region``
    (their protocols are in ``dispatch.py`` and ``ragged.py``); any other writes :meth:`forward`.

    This class holds the parameters of feed-forward experts: linear, GELU or a SwiGLU, linear. They are divided by
    expert over the expert group and, inside an expert, by width over the expert_tensor group. A SwiGLU's first
    projection alternates gate and linear part, so even parts contain both.

    Args:
        spec: Experts E, a multiple of the expert degree, whose inner width is a multiple of the expert_tensor degree.
        topology: The process's place in the meshes.

    Attributes:
        dispatch: Class of the specification of its collectives.
        sends_pilots: Whether it obeys ``comm.dedup``.
        unlimited: Whether experts take every row that chose them. Routings then have a place for every choice, sorted
            by expert; otherwise they have a slot in a queue of limited capacity, or -1.
        packed: Whether experts get as many rows as slots are full, although their capacity is limited.
        compilable: Whether ``torch.compile`` may see into it: all shapes are known before routers choose.
        moved: Rows of all forward passes so far that a backward pass may follow, if routers decide how many; else None.
    """

    dispatch: ClassVar[type[DispatchSpec]] = DispatchSpec
    sends_pilots: ClassVar[bool] = False
    unlimited: ClassVar[bool] = False
    packed: ClassVar[bool] = False
    compilable: bool = True
    moved: Rows | None = None

    @classmethod
    def make(cls, spec: ExpertsSpec, topology: Topology) -> "Experts":
        """Makes the experts of a layer whose configuration names this class."""
        return cls(spec, topology)

    @classmethod
    def alone(cls, degrees: ParallelDegrees) -> bool:
        """Tells whether it makes :class:`tedlab.moe.LocalExperts`: every process has all experts, whole or by width."""
        return False

    def __init__(self, spec: ExpertsSpec, topology: Topology) -> None:
        super().__init__()
        self.num_experts, self.comm = spec.num_experts, topology.comm
        self.nonlinearity, self.bias = spec.expert.nonlinearity, spec.expert.bias
        self.widths = spec.hidden, spec.expert.ffn // topology.degrees.expert_tensor
        self.build(spec, topology)

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Returns this process's projections, each with its biases: (e, H, ·), (e, 1, ·), (e, ·, H), (e, 1, H)."""
        up_bias, down_bias = (self.local("up_bias"), self.local("down_bias")) if self.bias else (None, None)
        return self.local("up"), up_bias, self.local("down"), down_bias

    def expect(self, tokens: int, slots: int) -> None:
        """Prepares for a forward pass of so many tokens, to which each expert offers so many slots.

        Raises:
            ValueError: If its collectives would not fit those of other processes.
        """

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Maps this rank's tokens (T, H) to the gate-weighted sums of their experts' results (T, H)."""
        raise NotImplementedError

    def start(self, x_TH: Tensor) -> list[Issued[Any]] | None:
        """Begins to send tokens whatever the router will choose; what it returns goes to :meth:`answer`.

        Returns:
            What arrives; None if tokens go only where they are to go.
        """
        return None

    def send(self, x_TH: Tensor, routing: Routing) -> list[Issued[Any]] | None:
        """Begins to send tokens to their experts, so that the caller may compute until :meth:`answer`.

        Args:
            x_TH: This rank's tokens (T, H).
            routing: What the router chose.

        Returns:
            What arrives, in one or several chunks; None if the experts do nothing that others could run beside.
        """
        return None

    def answer(self, sent: list[Issued[Any]], routing: Routing) -> Issued[Tensor]:
        """Computes what :meth:`send` has sent as it arrives, and returns what :meth:`forward` does, on its way."""
        raise NotImplementedError


@mixtures.register("capacity")
class SlotExperts(Experts):
    """Experts with equal numbers of slots, which processes exchange as the topology's toggles say.

    Slots are filled, activated and summed by torch's operations, which the compiler fuses; with ``moe.kernel=triton``
    by the kernels that experts without a capacity use, outside of what is compiled.
    """

    path: TokenPath
    region: SlotRegion

    def __init__(self, spec: ExpertsSpec, topology: Topology) -> None:
        super().__init__(spec, topology)
        fused = spec.config.kernel == ExpertKernel.TRITON
        self.compilable, self.kernel = not fused, str(ExpertKernel.TRITON if fused else ExpertKernel.TORCH)
        self.path, self.region = token_path(spec.num_experts, topology, self.kernel)
        self.agreement, self.chunks = topology.slots, topology.layout.chunks

    def expect(self, tokens: int, slots: int) -> None:
        self.agreement.expect(self, tokens, slots)

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        sent = self.send(x_TH, routing) if self.chunks > 1 else None
        if sent is None:
            return self.path.combine(self.compute(self.path.dispatch(x_TH, routing)), routing)
        return self.answer(sent, routing).wait()

    def send(self, x_TH: Tensor, routing: Routing) -> list[Issued[Tensor]] | None:
        return self.path.send(x_TH, routing) if isinstance(self.path, OverlappingPath) else None

    def answer(self, sent: list[Issued[Tensor]], routing: Routing) -> Issued[Tensor]:
        return _answered(self, self.path, sent, routing)

    def compute(self, x_eNH: Tensor) -> Tensor:
        """Maps the slots of this process's experts (e, N, H) to their results (e, N, H)."""
        up, up_bias, down, down_bias = self.weights()
        x_eNH = self.region.enter(x_eNH)
        h_eNF = project_slots(x_eNH, up, up_bias, self.nonlinearity, self.kernel)
        return self.region.leave(matmul_into(h_eNF, down, "experts.reduce"), down_bias)


class RowExperts(Experts):
    """Experts that take every row that chose them; processes exchange rows as the topology's toggles say."""

    unlimited = True
    compilable = False
    path: RowPath
    region: RowRegion

    def __init__(self, spec: ExpertsSpec, topology: Topology) -> None:
        super().__init__(spec, topology)
        self.kernel = spec.config.kernel
        # All tensor ranks plan alike, for the processes of the first of them.
        group = topology.degrees.groups(self.comm.ranks["expert_tensor"][0])["expert"]
        policy = policy_of(spec.config.lend, group, topology.degrees.expert_tensor)
        self.path, self.region = ragged_path(spec.num_experts, self.widths, topology, self.kernel, policy, self.packed)
        self.chunks = topology.layout.chunks

    @property
    def moved(self) -> Rows:  # type: ignore[override]
        return self.path.moved

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        if self.chunks > 1 and isinstance(self.path, OverlappingRowPath):
            return _answered(self, self.path, self.path.send(x_TH, routing), routing).wait()
        return self.path.combine(self.compute(self.path.dispatch(x_TH, routing)), routing)

    def send(self, x_TH: Tensor, routing: Routing) -> list[Issued[RaggedRows]] | None:
        return self.path.send(x_TH, routing) if isinstance(self.path, OverlappingRowPath) else None

    def answer(self, sent: list[Issued[RaggedRows]], routing: Routing) -> Issued[Tensor]:
        return _answered(self, self.path, sent, routing)

    def compute(self, x: RaggedRows) -> RaggedRows:
        """Maps the rows of this process's experts to their results, which go back the way the rows came."""
        own: tuple[Tensor | None, ...] = self.weights()
        more: tuple[Tensor | None, ...] = (None,) * len(own)
        loans = x.exchange.loans
        if loans is not None:
            assert x.exchange.lent is not None
            own, borrowed = lend(own, loans, x.exchange.lent, self.comm)
            more = borrowed if loans.borrowed else more
        (up, up_bias, down, down_bias), (more_up, more_up_bias, more_down, more_down_bias) = own, more
        assert up is not None
        assert down is not None
        arrangement = arrange(x.exchange)
        groups = arrangement.groups
        x_NH = self.region.enter(x, arrangement)
        z_NZ = grouped_matmul(x_NH, up, groups, more_bKM=more_up)
        h_NF = activate_rows(z_NZ, _biases(up_bias, more_up_bias), groups, self.nonlinearity, self.kernel)
        partial_NH = grouped_matmul(h_NF, down, groups, self.region.feeds, more_down)
        bias_eH = _biases(down_bias, more_down_bias)
        if bias_eH is not None:
            first = self.comm.rank("expert_tensor") == 0  # one tensor rank adds it, for all
            partial_NH = add_bias(partial_NH, bias_eH, groups, first)
        return x._replace(values=self.region.leave(partial_NH, x.exchange, arrangement))


def _biases(own_e1F: Tensor | None, more_b1F: Tensor | None) -> Tensor | None:
    """Returns the biases of this process's experts, if they have any, and of those that it borrows: (e + b, F)."""
    if own_e1F is None:
        return None
    return (own_e1F if more_b1F is None else torch.cat((to_compute_dtype(own_e1F), more_b1F))).squeeze(1)


def _answered(experts: Any, path: Any, sent: list[Issued[Any]], routing: Routing) -> Issued[Tensor]:
    """Computes each chunk as it arrives, while the others are on their way there or back."""
    back = [path.answer(experts.compute(chunk.wait())) for chunk in sent]
    return Issued(lambda: path.receive([chunk.wait() for chunk in back], routing))
