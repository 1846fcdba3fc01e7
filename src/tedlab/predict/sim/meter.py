"""Below everything that runs: counts each operation's FLOPs, time and memory, by phase of the step."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tedlab._compat.simulation import READ_SCALAR, FakeTensor
from tedlab._compat.torch import TorchDispatchMode, collective_operators, in_backward, local_tensor, tree_map_only
from tedlab.comm import Collective, GroupKind, Ledger, Phase, recomputing
from tedlab.comm.ledger import Entry
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.cost import LinkClass, collective_seconds, link_of, waiting_seconds, wire_bytes_by_link
from tedlab.predict.sim.memory import Category, Memory
from tedlab.predict.sim.roofline import seconds, work_of
from tedlab.spec import Work

_READ = READ_SCALAR.default
_WAIT = collective_operators.wait_tensor.default
_DRAW = torch.ops.aten.exponential_.default
_DEVICE = torch.ops.prim.device.default  # asked of fake tensors all the time

MATRICES, KERNELS = "matrix products", "other kernels"


class Counts:
    """Of one micro-batch, and of the optimizer's work after it.

    Attributes:
        ledger: of collectives.
        flops: by phase.
        kernels: how often each work was done, by phase.
        seconds: predicted, by phase and cause: ``matrix products``, ``other kernels``, or ``<operation>, <link>``.
        collectives: their predicted seconds, waiting for others included, by the ledger's entries.
        wire: bytes that this rank sends, by link.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.flops: defaultdict[Phase, float] = defaultdict(float)
        self.kernels: Counter[tuple[Phase, Work]] = Counter()
        self.seconds: defaultdict[tuple[Phase, str], float] = defaultdict(float)
        self.collectives: defaultdict[Entry, float] = defaultdict(float)
        self.wire: defaultdict[LinkClass, float] = defaultdict(float)


class Meter(TorchDispatchMode):
    """Enter it above fake tensors, and register :meth:`on_collective` as a hook.

    Fake tensors have no values: what the host reads is 1 (a norm, a step count). Waiting for a collective returns its
    result itself, as it really does; torch's fake version would allocate another.

    Args:
        cluster: for predicted times.
        members: the global ranks of the rank's group of each kind.
        memory: told of every tensor once :attr:`counts` is set.

    Attributes:
        counts: what is added to; None: nothing is counted.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        members: Mapping[GroupKind, Sequence[int]],
        memory: Memory,
        progress: Callable[[], None],
    ) -> None:
        super().__init__()
        self.cluster, self.members, self.memory, self.progress = cluster, members, memory, progress
        self.counts: Counts | None = None
        self._in_forward = False
        self._communicated = 0.0  # predicted seconds until the last collective ended
        self._host = 0.0  # predicted seconds until the host has issued what it issued so far

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Within: what is not part of a backward pass is one of forward."""
        self._in_forward = True
        try:
            yield
        finally:
            self._in_forward = False

    @property
    def phase(self) -> Phase:
        """Where this thread is in the step; outside passes with the optimizer. Gradients are added up in backward."""
        if in_backward():
            return "recompute" if recomputing() else "backward"
        return "forward" if self._in_forward else "optimizer"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:
            return FakeTensor.__torch_dispatch__(func, types, args)  # which knows without asking its mode
        if func is _WAIT:
            return args[0]
        if func is _READ:
            if self.memory.category_of(args[0]) != "optimizer":  # of an optimizer's state steps are, kept by the host
                self._host = max(self._host, self.memory.now)
            return 1.0 if args[0].is_floating_point() else 1
        # Of drawing in place torch's fake version refuses a generator; there is nothing to draw into.
        out = args[0] if func is _DRAW else func(*args, **kwargs)
        if self.counts is not None:
            if DTensor in types:  # autograd accumulates these; counted is what happens to their local tensors
                self._count(self.counts, func, *tree_map_only(DTensor, _inner, (args, kwargs, out)))
            else:
                self._count(self.counts, func, args, kwargs, out)
        return out

    def _count(self, counts: Counts, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        phase = self.phase
        work = work_of(func, args, kwargs, out)
        if work is not None:
            self._do(counts, phase, work)
        category: Category = "activations" if phase in ("forward", "recompute") else "temporaries"
        results = out if isinstance(out, list | tuple) else (out,)
        self.memory.see((result for result in results if isinstance(result, Tensor)), category)

    def _do(self, counts: Counts, phase: Phase, work: Work) -> None:
        taken = self._advance(seconds(work, self.cluster), self._dispatch(phase))
        counts.flops[phase] += work.flops
        counts.kernels[phase, work] += 1
        counts.seconds[phase, MATRICES if work.flops else KERNELS] += taken

    def _dispatch(self, phase: Phase) -> float:
        dispatch = self.cluster.kernels.dispatch
        if phase == "optimizer":
            return dispatch.optimizer
        return dispatch.backward if phase == "backward" else dispatch.forward

    def _advance(self, device: float, host: float) -> float:
        """Issues something that keeps device and host busy for so long; returns the time until the device is done."""
        self._host += host
        taken = max(0.0, self._host - self.memory.now) + device  # it may have to wait for the host
        self.memory.now += taken
        if not self.cluster.kernels.asynchronous:
            self._host = self.memory.now
        return taken

    def on_fused_step(
        self,
        master: Tensor,
        gradient: Tensor,
        state: Mapping[str, Any],
        group: Mapping[str, Any],
        factor: float,
        rounded: Tensor | None,
    ) -> None:
        """In place of the kernel of a fused Adam step: one pass over memory, as on a GPU; arguments as there."""
        if self.counts is not None:
            both_ways = master, state["exp_avg"], state["exp_avg_sq"]
            one_way = (gradient,) if rounded is None else (gradient, rounded)
            moved = sum(t.nbytes for t in (*both_ways, *both_ways, *one_way))
            self._do(self.counts, self.phase, Work(0.0, moved, master.dtype, "movement"))

    def label_gradient(self, gradient: Tensor | None) -> None:
        """Says that this tensor, if there is one, is a gradient to be kept."""
        if gradient is not None and self.counts is not None:
            self.memory.label([_inner(gradient)], "gradients")

    def on_collective(self, call: Collective, event: Literal["start", "end"]) -> None:
        """Hears of a collective, as hooks do."""
        self.progress()
        if self.counts is None or event == "start":
            return
        counts, members = self.counts, self.members[call.kind]
        counts.ledger(call, event)
        waiting = waiting_seconds(self.memory.now - self._communicated, members, self.cluster)
        alone = collective_seconds(call.op, call.even_payload_bytes, members, self.cluster)
        taken = self._advance(waiting + alone, 0.0)
        self._communicated = self.memory.now
        link = link_of(members, self.cluster.gpus_per_node)
        counts.seconds[call.phase, f"{call.op}, {link}"] += taken
        counts.collectives[Entry(call.phase, call.kind, call.op, call.tag)] += taken
        sent = wire_bytes_by_link(call.op, call.even_payload_bytes, members, self.cluster.gpus_per_node)
        for name, size in sent.items():
            counts.wire[name] += size


def _inner(tensor: Tensor) -> Tensor:
    """What a DTensor has of its own, without an operation."""
    return local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
