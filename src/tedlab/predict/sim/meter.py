"""Counts the FLOPs, time and memory of each operation that torch dispatches, by phase of the step."""

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
from tedlab.predict.sim.fusion import Fusion
from tedlab.predict.sim.lanes import Lanes, Transfer
from tedlab.predict.sim.memory import Category, StorageTracker
from tedlab.predict.sim.roofline import seconds, tensors_in, work_of
from tedlab.spec import Kernel, Work

_READ = READ_SCALAR.default
_WAIT = collective_operators.wait_tensor.default
_DRAW = torch.ops.aten.exponential_.default
_DEVICE = torch.ops.prim.device.default  # dispatched for fake tensors all the time

MATRICES, KERNELS = "matrix products", "other kernels"
HIDDEN = "hidden by overlap"


class Counts:
    """The counts for one micro-batch and for the optimizer's work after it.

    Attributes:
        ledger: The ledger of collectives.
        flops: FLOPs by phase.
        kernels: How often each kind of work was done, by phase.
        seconds: Predicted seconds by phase and cause: ``matrix products``, ``other kernels``, ``<operation>, <link>``;
            and, as negative numbers, ``hidden by overlap``: what collectives take while the processor computes.
        collectives: Predicted seconds of collectives, including the wait for other ranks, by the ledger's entries.
        hidden: How many of these the processor does not wait for; negative where it waits longer, because the link was
            busy with another.
        wire: The bytes that this rank sends, by link.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.flops: defaultdict[Phase, float] = defaultdict(float)
        self.kernels: Counter[tuple[Phase, Work]] = Counter()
        self.seconds: defaultdict[tuple[Phase, str], float] = defaultdict(float)
        self.collectives: defaultdict[Entry, float] = defaultdict(float)
        self.hidden: defaultdict[Entry, float] = defaultdict(float)
        self.wire: defaultdict[LinkClass, float] = defaultdict(float)


class Meter(TorchDispatchMode):
    """Counts what one rank does. Enter it inside a fake tensor mode, and register :meth:`on_collective` as a hook.

    Fake tensors have no values, so the host reads 1 for every scalar (a norm, a step count). Waiting for a collective
    returns the collective's own result, as in reality, whereas torch's fake version would allocate another tensor.

    Args:
        cluster: The cluster that times are predicted for.
        members: The global ranks of the rank's group of each kind.
        memory: The memory that records every tensor while :attr:`counts` is set.
        progress: Called at the start and end of every collective.

    Attributes:
        counts: The counts to add to; None: nothing is counted.
        lanes: What the processor and the links do, and when.
        fusion: The kernel that a compiler is making.
        parts: The counts of each micro-batch, by its number within the step.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        members: Mapping[GroupKind, Sequence[int]],
        memory: StorageTracker,
        progress: Callable[[], None],
    ) -> None:
        super().__init__()
        self.cluster, self.members, self.memory, self.progress = cluster, members, memory, progress
        self.counts: Counts | None = None
        self.lanes, self.fusion = Lanes(), Fusion()
        self.parts: dict[int, Counts] = {}
        self._products: list[Work] | None = None  # those of a kernel that does many
        self._in_forward = False
        self._on_their_way: dict[int, Transfer] = {}  # by id() of the call
        self._communicated = 0.0  # predicted time at which the last collective was issued or awaited
        self._host = 0.0  # predicted time at which the host has issued all operations so far

    def start(self, micro_batch: int) -> None:
        """Adds to the counts of a micro-batch from now on."""
        self.counts = self.parts.setdefault(micro_batch, Counts())

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Counts operations within the block as forward unless they are part of a backward pass."""
        self._in_forward = True
        try:
            yield
        finally:
            self._in_forward = False

    @property
    def phase(self) -> Phase:
        """The phase of this thread: ``optimizer`` outside of passes; gradients are accumulated in ``backward``."""
        if in_backward():
            return "recompute" if recomputing() else "backward"
        return "forward" if self._in_forward else "optimizer"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:
            return FakeTensor.__torch_dispatch__(func, types, args)  # answers without its mode
        if func is _WAIT:
            return args[0]
        if func is _READ:
            if self.memory.category_of(args[0]) != "optimizer":  # the optimizer's step counts are on the host
                self._host = max(self._host, self.memory.now)
            return 1.0 if args[0].is_floating_point() else 1
        # torch's fake version of drawing in place refuses a generator, and there is nothing to draw into.
        out = args[0] if func is _DRAW else func(*args, **kwargs)
        if self.counts is not None:
            if DTensor in types:  # autograd accumulates DTensors; the work is done on local ones
                self._count(self.counts, func, *tree_map_only(DTensor, _inner, (args, kwargs, out)))
            else:
                self._count(self.counts, func, args, kwargs, out)
        return out

    def _count(self, counts: Counts, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        phase = self.phase
        work = work_of(func, args, kwargs, out)
        if work is not None and self.fusion.on and work.kind in ("arithmetic", "movement"):
            self.fusion.takes(tensors_in(args), tensors_in((out,)))
            return  # a kernel allocates only what it leaves
        collective = func.namespace == "_c10d_functional"  # whose launch is counted where it starts
        if work is not None:
            self.end_kernel()
            launched = collective and self.cluster.kernels.asynchronous
            self._do(counts, phase, work, 0.0 if launched else self._dispatch(phase))
        elif self.cluster.kernels.dispatch.views and not (collective or self.fusion.on or self._products is not None):
            counts.seconds[phase, KERNELS] += self._ask(self._dispatch(phase))
        results = out if isinstance(out, list | tuple) else (out,)
        self.memory.see((result for result in results if isinstance(result, Tensor)), self._category)

    @property
    def _category(self) -> Category:
        return "activations" if self.phase in ("forward", "recompute") else "temporaries"

    @contextmanager
    def one_kernel(self, kernel: Kernel) -> Iterator[None]:
        """Counts the products inside as this one kernel, which does all that they do."""
        self._products = []
        try:
            yield
        finally:
            products, self._products = self._products, None
        if products and self.counts is not None:
            (flops, moved), first = map(sum, zip(*((p.flops, p.bytes) for p in products), strict=True)), products[0]
            self._do(self.counts, self.phase, first._replace(flops=flops, bytes=moved, kernel=kernel))

    def _do(self, counts: Counts, phase: Phase, work: Work, host: float | None = None) -> None:
        """Counts a kernel, which the host takes some seconds to launch; None: as the cluster says of this phase."""
        if self._products is not None and work.flops:
            self._products.append(work)
            return
        alone, cause = seconds(work, self.cluster), MATRICES if work.flops else KERNELS
        taken = self._advance(alone, self._dispatch(phase) if host is None else host)
        self.lanes.compute(phase, cause, self.memory.now - alone, self.memory.now)
        counts.flops[phase] += work.flops
        counts.kernels[phase, work] += 1
        counts.seconds[phase, cause] += taken

    def _dispatch(self, phase: Phase) -> float:
        dispatch = self.cluster.kernels.dispatch
        if phase == "optimizer":
            return dispatch.optimizer
        return dispatch.backward if phase == "backward" else dispatch.forward

    def _advance(self, device: float, host: float) -> float:
        """Issues work of so many seconds for device and host, and returns the seconds until the device is done."""
        self._host += host
        taken = max(0.0, self._host - self.memory.now) + device  # the device may have to wait for the host
        self.memory.now += taken
        if not self.cluster.kernels.asynchronous:
            self._host = self.memory.now
        return taken

    def _ask(self, host: float) -> float:
        """Lets the host work without asking the device for anything, and returns the seconds if it is the device."""
        self._host += host
        if self.cluster.kernels.asynchronous:
            return 0.0
        self.memory.now += host
        return host

    def on_read(self, answer: Callable[[Tensor], list[Any]], values: Tensor) -> Callable[[], list[Any]]:
        """Starts a read of the host as :func:`tedlab.comm.reading.start` does: it waits for what was issued before."""
        numbers, copied = answer(values), self.memory.now

        def wait() -> list[Any]:
            self._host = max(self._host, copied)
            return numbers

        return wait

    def on_fused_step(
        self,
        master: Tensor,
        gradient: Tensor,
        state: Mapping[str, Any],
        group: Mapping[str, Any],
        factor: float,
        rounded: Tensor | None,
    ) -> None:
        """Replaces the kernel of a fused Adam step, with the same arguments: one pass over memory, as on a GPU."""
        if self.counts is not None:
            both_ways = master, state["exp_avg"], state["exp_avg_sq"]
            one_way = (gradient,) if rounded is None else (gradient, rounded)
            moved = sum(t.nbytes for t in (*both_ways, *both_ways, *one_way))
            self._do(self.counts, self.phase, Work(0.0, moved, master.dtype, "movement", kernel=Kernel("adam")))

    def compile(self, on: bool) -> None:
        """Says whether what follows is compiled."""
        self.end_kernel()
        self.fusion.on = on

    def end_kernel(self) -> None:
        """Counts the compiled kernel under way, if there is one."""
        if self.counts is not None and (kernel := self.fusion.ends()) is not None:
            work, left = kernel
            self._do(self.counts, self.phase, work)
            for storage in left:
                self.memory.see_storage(storage, self._category)

    def on_norm(self, operands: Sequence[Tensor], result: Tensor | None) -> None:
        """Counts a norm's kernel; a compiler joins it with others, unless it only sums over tokens."""
        if self.fusion.on and result is not None:
            self.fusion.takes(operands, [result])
        else:
            name = "norm_backward" if self.phase == "backward" else "norm"
            name = "compiled" if self.fusion.on else name
            self.on_kernel(name, *operands, *([] if result is None else [result]))

    def on_kernel(self, name: str, *tensors: Tensor) -> None:
        """Counts a kernel that shows no operations, and reads or writes each of these tensors once."""
        if self.counts is not None:
            moved = sum(tensor.nbytes for tensor in tensors)
            self._do(self.counts, self.phase, Work(0.0, moved, torch.float32, "arithmetic", kernel=Kernel(name)))

    def label_gradient(self, gradient: Tensor | None) -> None:
        """Labels the tensor, if there is one, as a gradient."""
        if gradient is not None and self.counts is not None:
            self.memory.label([_inner(gradient)], "gradients")

    def on_collective(self, call: Collective, event: Literal["start", "end"]) -> None:
        """Handles the start or end of a collective, as a hook does."""
        self.progress()
        if event == "start":
            if self.counts is not None:
                self._on_their_way[id(call)] = self._issue(call)
        elif (transfer := self._on_their_way.pop(id(call), None)) is not None and self.counts is not None:
            self._await(self.counts, call, transfer)

    def _issue(self, call: Collective) -> Transfer:
        self.end_kernel()
        if self.cluster.kernels.asynchronous:
            self._host += self.cluster.kernels.dispatch.collective
        members, now = self.members[call.kind], self.memory.now
        waiting = waiting_seconds(now - self._communicated, members, self.cluster)
        alone = collective_seconds(call.op, call.even_payload_bytes, members, self.cluster)
        self._communicated = now
        link, name = link_of(members, self.cluster.gpus_per_node), f"{call.op} {call.tag}"
        reduction = call.tag == "gradients.reduce"
        return self.lanes.issue(link, call.phase, name, max(now, self._host), waiting + alone, yields=reduction)

    def _await(self, counts: Counts, call: Collective, transfer: Transfer) -> None:
        end, ready = self.lanes.end(transfer), max(self.memory.now, self._host)
        hidden = 0.0
        if transfer.start != ready:  # otherwise nothing was computed meanwhile, and the link was free
            hidden = transfer.seconds - max(0.0, end - ready)
        taken = self._advance(transfer.seconds - hidden, 0.0) + hidden
        self._communicated = self.memory.now
        members, entry = self.members[call.kind], Entry(call.phase, call.kind, call.op, call.tag)
        counts.ledger(call, "end")
        counts.seconds[call.phase, f"{call.op}, {transfer.link}"] += taken
        counts.collectives[entry] += taken
        if hidden:
            counts.hidden[entry] += hidden
            counts.seconds[call.phase, HIDDEN] -= hidden
        sent = wire_bytes_by_link(call.op, call.even_payload_bytes, members, self.cluster.gpus_per_node)
        for name, size in sent.items():
            counts.wire[name] += size


def _inner(tensor: Tensor) -> Tensor:
    """Returns the local tensor of a DTensor without dispatching an operation."""
    return local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
