"""Times operations on this machine. Each runs in all processes at the same time, as it does in training.

If processes share cores, the timings therefore show what each of them gets. A GPU times kernels by its own clock, and
all of them are queued before the first one starts; the host's time to launch them is measured separately.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise
from statistics import fmean, median
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tedlab._compat.simulation import READ_SCALAR
from tedlab._compat.torch import TorchDispatchMode, delay_gpu
from tedlab.comm import Collectives
from tedlab.comm.collectives import Operation
from tedlab.config import ModelConfig, MoEConfig
from tedlab.degrees import ParallelDegrees
from tedlab.models import GPT
from tedlab.optim import ShardedOptimizer
from tedlab.predict.calibrate.fit import Series, Table
from tedlab.predict.calibrate.kernels import KERNEL_SIZES, Call, Case, Cases, KernelSizes
from tedlab.predict.cluster import Dispatch
from tedlab.topology import Topology

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MIB = 2**20
_BLOCKS = 5  # blocks of calls, over which the median is taken
_QUEUED = 200  # the most calls queued on a GPU at a time: the driver's queue has room for a thousand kernels
_CYCLES = 4e9  # about twice a GPU's clock cycles per second
_TILE = 64  # elements: few enough for a tiny model to have more tiles than parameters, as large ones do
_FRESH = 64 * _MIB
_HEADS = {"cpu": 64, "cuda": 128}  # the width of an attention head


@dataclass(frozen=True)
class Sizes:
    """The sizes to measure.

    Attributes:
        block: Seconds of calls that are timed together, long enough for processes to take turns on a core.
        products: (rows, inputs, outputs) of linear layers.
        slow: (rows, inputs, outputs) for dtypes that the machine has no units for.
        attention: (samples, heads, tokens).
        streams: Bytes of one operand.
        pool: Bytes of all operands of a stream, which take turns.
        messages: Bytes of a collective's buffer.
        repeats: How often the first linear layer runs between two collectives.
        kernels: Those of kernels that are timed by size.
    """

    block: float
    products: Sequence[tuple[int, int, int]]
    slow: tuple[int, int, int]
    attention: Sequence[tuple[int, int, int]]
    streams: Sequence[int]
    pool: int
    messages: Sequence[int]
    repeats: Sequence[int]
    kernels: KernelSizes

    def shortened(self) -> "Sizes":
        """Returns only the first and last of all sizes, for a rough measurement within seconds."""
        return Sizes(
            self.block / 20,
            self.products[:: len(self.products) - 1],
            self.slow,
            self.attention[:: len(self.attention) - 1],
            self.streams[:: len(self.streams) - 1],
            self.pool // 8,
            self.messages[:: len(self.messages) - 1],
            self.repeats[:: len(self.repeats) - 1],
            self.kernels.shortened(),
        )


SIZES = {
    "cpu": Sizes(
        block=0.06,
        products=[
            (128, 128, 512),
            (256, 256, 512),
            (512, 256, 1024),
            (512, 512, 1024),
            (512, 512, 2048),
            (1024, 512, 2048),
            (1024, 1024, 2048),
        ],
        slow=(128, 128, 512),
        attention=[(1, 4, 128), (2, 4, 256), (4, 8, 256), (2, 8, 512)],
        streams=[_MIB // 4, _MIB, 2 * _MIB, 4 * _MIB, 8 * _MIB],
        pool=96 * _MIB,
        # fresh_bandwidth covers the memory of larger ones
        messages=[4096, 64 * 1024, _MIB // 2, 2 * _MIB, 8 * _MIB, 24 * _MIB],
        repeats=[32, 128],
        kernels=KERNEL_SIZES["cpu"],
    ),
    "cuda": Sizes(
        block=0.03,
        products=[
            (2048, 1024, 2048),
            (2048, 2048, 2048),
            (2048, 2048, 8192),
            (4096, 2048, 8192),
            (4096, 4096, 8192),
            (4096, 4096, 16384),
        ],
        slow=(2048, 1024, 2048),
        attention=[(1, 16, 1024), (1, 16, 2048), (2, 16, 2048), (4, 16, 2048)],
        streams=[4 * _MIB, 8 * _MIB, 16 * _MIB, 64 * _MIB, 128 * _MIB],
        pool=1024 * _MIB,
        messages=[64 * 1024, *(size * _MIB for size in (1, 4, 16, 32, 64, 128, 256, 512, 1024))],
        repeats=[32, 128],
        kernels=KERNEL_SIZES["cuda"],
    ),
}


@dataclass(frozen=True)
class Group:
    """A kind of group: the number of its ranks, and of the nodes that they are on."""

    size: int
    nodes: int


@dataclass(frozen=True)
class Measured:
    """All measurements.

    Attributes:
        products: Matrix products, by dtype.
        attention: Forward and backward passes of attention.
        movement: Kernels that add and copy.
        arithmetic: Kernels that compute more for each element, such as GELU and softmax.
        dispatch: Seconds of one operation that has next to nothing to compute, or nothing, by phase.
        fresh: Bytes/s of writing memory that is new to the process; None on a GPU, whose allocator keeps its memory.
        collectives: Collectives, by operation and kind of group.
        waits: Seconds of computing, and of computing and waiting for the slowest rank, by kind of group.
        kernels: Kernels by size.
    """

    products: dict[str, Series]
    attention: Series
    movement: Series
    arithmetic: Series
    dispatch: Dispatch
    fresh: float | None
    collectives: dict[tuple[Operation, Group], Series]
    waits: dict[Group, Series]
    kernels: Sequence[Table] = ()


class Bench:
    """Measures in lockstep with all other processes.

    Args:
        device: The device of this process.
        per_node: The number of processes on each node.
        sizes: The sizes to measure.
        progress: Called before each timing with a description of it.
    """

    def __init__(self, device: torch.device, per_node: int, sizes: Sizes, progress: Callable[[str], None]) -> None:
        self.device, self.per_node, self.sizes, self.progress = device, per_node, sizes, progress
        self.world = dist.get_world_size()
        self.main = "bf16" if device.type == "cuda" else "fp32"  # the dtype that models are trained in on this device
        self.cases = list(Cases(device, self.main, DTYPES[self.main], sizes.kernels))

    def timings(self) -> int:
        """Returns the number of timings that :meth:`measure` takes."""
        sizes, groups = self.sizes, len(list(self._kinds()))
        products = sum(len(self._products(name)) for name in DTYPES)
        messages = groups * (len(get_args(Operation)) * len(sizes.messages) + 1 + len(sizes.repeats))
        kernels = sum(len(case.sizes) for case in self.cases)
        lines = products + len(sizes.attention) + 2 * len(sizes.streams)
        return lines + 1 + self._launches + (self.device.type == "cpu") + messages + kernels

    @property
    def _launches(self) -> bool:
        return self.world > 1 and self.device.type != "cpu"

    def measure(self) -> Measured:
        """Measures everything."""
        return Measured(
            {name: self._gemm(name) for name in DTYPES},
            self._attention(),
            self._stream("movement", [lambda x: x + x, torch.clone], "x + x, x.clone()"),
            self._stream(
                "arithmetic",
                [F.gelu, lambda x: F.softmax(x, -1), lambda x: F.layer_norm(x, x.shape[-1:])],
                "GELU, softmax and layer norm in turn",
            ),
            self._dispatch(),
            self._fresh() if self.device.type == "cpu" else None,
            {
                (op, kind): self._collective(op, kind, group)
                for kind, group in self._groups()
                for op in get_args(Operation)
            },
            {kind: self._waiting(kind, group) for kind, group in self._groups()},
            [self._table(case) for case in self.cases],
        )

    def _products(self, dtype: str) -> Sequence[tuple[int, int, int]]:
        slow = self.device.type == "cpu" and dtype in ("fp64", "fp16")
        return [self.sizes.slow] if slow else self.sizes.products

    def _gemm(self, name: str) -> Series:
        amounts, seconds = [], []
        for rows, inputs, outputs in self._products(name):
            x, w, g = (
                torch.randn(shape, device=self.device, dtype=DTYPES[name])
                for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
            )

            def both_passes(x: Tensor = x, w: Tensor = w, g: Tensor = g) -> None:
                x @ w.t()
                g @ w
                g.t() @ x

            amounts.append(2.0 * rows * inputs * outputs)
            seconds.append(self._time(f"matrix products in {name}", both_passes) / 3)
        return Series(name, "FLOP", "linear layers, the three products of both passes", amounts, seconds)

    def _attention(self) -> Series:
        amounts, seconds = [], []
        width = _HEADS[self.device.type]
        for samples, heads, tokens in self.sizes.attention:
            q, k, v, g = (
                torch.randn(samples, heads, tokens, width, device=self.device, dtype=DTYPES[self.main])
                for _ in range(4)
            )
            inputs = [x.requires_grad_() for x in (q, k, v)]

            def both_passes(inputs: list[Tensor] = inputs, g: Tensor = g) -> None:
                q, k, v = inputs
                torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), inputs, g)

            amounts.append(7.0 * samples * heads * tokens**2 * width / 2)  # two products forward, five backward, halved
            seconds.append(self._time("attention", both_passes) / 2)
        how = f"causal, in {self.main}, heads of {width}, forward and backward pass"
        return Series("attention", "FLOP", how, amounts, seconds)

    def _stream(self, name: str, kernels: list[Callable[[Tensor], Tensor]], what: str) -> Series:
        amounts, seconds = [], []
        itemsize = DTYPES[self.main].itemsize
        for size in self.sizes.streams:
            number = max(2, self.sizes.pool // size)
            pool = [
                torch.randn(size // itemsize // 512, 512, device=self.device, dtype=DTYPES[self.main])
                for _ in range(number)
            ]
            operands = cycle(pool)  # each has left the cache by its next turn

            def once(operands: Iterator[Tensor] = operands) -> None:
                for kernel in kernels:
                    kernel(next(operands))

            amounts.append(2.0 * size)
            seconds.append(self._time(f"{name} of bytes", once) / len(kernels))
        return Series(name, "B", f"{what}; {self.main}, bytes read and written", amounts, seconds)

    def _table(self, case: Case) -> Table:
        amounts, seconds = [], []
        for size in case.sizes:
            calls = [case.prepare(size)]
            if case.unit == "B":  # operands have left the cache by their next turn
                calls += [case.prepare(size) for _ in range(int(self.sizes.pool // calls[0].amount))]
            turns = cycle(calls)

            def once(turns: Iterator[Call] = turns) -> None:
                next(turns).run()

            amounts.append(calls[0].amount)
            seconds.append(self._time(f"{case.kernel} by size", once))
        sizes = amounts if case.unit == "B" else case.sizes
        return Table(case.kernel, case.unit, case.how, amounts, seconds, sizes, case.width, case.dtype)

    def _dispatch(self) -> Dispatch:
        """Times a model so small that only the host's work is left, per operation that a simulation would count.

        Passes take turns, as in training: on a CPU a backward pass that was repeated through a graph that is kept took
        0.6 of the time of one through a new graph.
        """
        model = ModelConfig(layers=4, hidden=16, heads=2, ffn=32, sequence_length=16, vocab_size=64)
        topology = Topology(ParallelDegrees(self.world), self.device)
        network = GPT(model, MoEConfig(num_experts=4), topology, seed=0)
        ids = torch.zeros(1, 16, dtype=torch.int64, device=self.device)
        names = {parameter: name for name, parameter in network.named_parameters()}
        adam = torch.optim.AdamW(list(names), lr=0.0)
        alone, _ = dist.new_subgroups(1)  # groups of one process, so that nothing is communicated
        comm = Collectives(dict.fromkeys(topology.comm.sizes, alone))
        sharded = ShardedOptimizer(adam, comm, names, zero=True, tile=_TILE)
        losses: list[Tensor] = []

        def forward() -> None:
            losses.append(network(ids)[0].sum())

        def backward() -> None:
            losses.pop().backward()

        def step() -> None:
            sharded.reduce_gradients()
            sharded.clip(1.0)
            adam.step()
            sharded.zero_grad()

        passes = forward, backward, step
        for each in passes:
            each()  # the first may do more than later ones
        adam.param_groups[0]["foreach"] = False  # as in simulations, whose tensors are not on a GPU
        numbers = [_operations(each) for each in passes]
        adam.param_groups[0]["foreach"] = None
        taken = self._in_turn("dispatch", passes)
        forwards, backwards, steps = (seconds / number for seconds, number in zip(taken, numbers, strict=True))
        return Dispatch(forwards, backwards, steps, views=True, collective=self._launching())

    def _launching(self) -> float:
        """Times how long the host takes to launch a collective; 0 where it takes part in them itself."""
        if not self._launches:
            return 0.0
        world = init_device_mesh(self.device.type, (self.world,)).get_group()
        comm, x = Collectives({"world": world}), torch.zeros(self.world, 256, device=self.device)
        every = [partial(getattr(comm, op), x, "world", tag="calibrate", phase="metrics") for op in get_args(Operation)]
        return fmean(self._in_turn("launching collectives", every))

    def _fresh(self) -> float:
        """Times more memory than the C library keeps, so that the system maps and clears every page anew."""
        return _FRESH / self._time("fresh memory", lambda: torch.zeros(_FRESH // 4))

    def _kinds(self) -> Iterator[tuple[Group, int, bool]]:
        """Yields the kinds of group, with their size and whether their ranks are consecutive."""
        seen = set()
        for size in (n for n in range(2, self.world + 1) if self.world % n == 0):
            for neighbours in (True, False):
                stride = 1 if neighbours else self.world // size
                nodes = len({rank * stride // self.per_node for rank in range(size)})
                if (size, nodes) not in seen:
                    seen.add((size, nodes))
                    yield Group(size, nodes), size, neighbours

    def _groups(self) -> Iterator[tuple[Group, dist.ProcessGroup]]:
        for kind, size, neighbours in self._kinds():
            shape = (self.world // size, size) if neighbours else (size, self.world // size)
            yield kind, init_device_mesh(self.device.type, shape).get_group(1 if neighbours else 0)

    def _collective(self, op: Operation, kind: Group, group: dist.ProcessGroup) -> Series:
        comm = Collectives({"world": group})
        amounts, seconds = [], []
        for size in self.sizes.messages:
            rows = size // 4 // 256 // kind.size * kind.size or kind.size
            x = torch.randn(rows // kind.size if op == "all_gather" else rows, 256, device=self.device)

            def once(x: Tensor = x) -> None:
                getattr(comm, op)(x, "world", tag="calibrate", phase="metrics")

            amounts.append(rows * 1024 * (kind.size - 1) / kind.size * (2 if op == "all_reduce" else 1))
            seconds.append(self._time(f"{op} of {kind.size}", once))
        how = f"{len(amounts)} sizes, bytes sent by a rank; all groups at the same time"
        return Series(op, "B", how, amounts, seconds)

    def _waiting(self, kind: Group, group: dist.ProcessGroup) -> Series:
        """Times how long ranks wait for the slowest: processes differ in speed, even more if they share a core."""
        comm, number = Collectives({"world": group}), torch.zeros(1, device=self.device)
        rows, inputs, outputs = self.sizes.products[0]
        x, w = (torch.randn(shape, device=self.device) for shape in ((rows, inputs), (inputs, outputs)))

        def meet() -> None:
            comm.all_reduce(number, "world", tag="calibrate", phase="metrics")

        def compute(times: int) -> None:
            for _ in range(times):
                x @ w

        def compute_and_meet(times: int) -> None:
            compute(times)
            meet()

        what = f"waiting for {kind.size}"
        meeting = self._time(what, meet)
        amounts, seconds = [], []
        for times in self.sizes.repeats:
            self.progress(what)
            alone, together = self._blocks([partial(compute, times), partial(compute_and_meet, times)])
            longer = median((b - meeting) / a for a, b in zip(alone, together, strict=True))  # compares adjacent blocks
            amounts.append(median(alone))
            seconds.append(amounts[-1] * max(1.0, longer))
        return Series("waiting", "s", "computing between two all-reduces of a number", amounts, seconds)

    def _time(self, what: str, function: Callable[[], Any]) -> float:
        """Returns the seconds of one call: the mean over processes, then the median over several blocks of calls.

        Args:
            what: A description for the progress bar.
            function: What keeps the device busy.
        """
        self.progress(what)
        (times,) = self._blocks([function])
        return median(times)

    def _blocks(self, functions: Sequence[Callable[[], Any]]) -> list[list[float]]:
        """Times blocks of calls, functions in turn; returns the seconds per call of each block, mean over processes."""
        block = self._on_gpu if self.device.type == "cuda" else self._on_host
        calls = []
        for function in functions:
            function()
            once = self._mean(self._on_host(function, 1))
            calls.append(max(1, math.ceil(self.sizes.block / once)))
        times: list[list[float]] = [[] for _ in functions]
        for _ in range(_BLOCKS):
            for function, number, taken in zip(functions, calls, times, strict=True):
                self._mean(0.0)  # a barrier, so that all processes begin together
                taken.append(self._mean(block(function, number)))
        return times

    def _in_turn(self, what: str, functions: Sequence[Callable[[], Any]]) -> list[float]:
        """Returns the host's seconds of each of several functions that take turns: mean over processes, then median."""
        self.progress(what)
        self._turn(functions)  # the first calls may do more than later ones
        rounds = math.ceil(len(functions) * self.sizes.block / self._mean(sum(self._turn(functions))))
        blocks = []
        for _ in range(_BLOCKS):
            self._mean(0.0)
            turns = [self._turn(functions) for _ in range(rounds)]
            blocks.append([self._mean(fmean(taken)) for taken in zip(*turns, strict=True)])
        return [median(times) for times in zip(*blocks, strict=True)]

    def _turn(self, functions: Sequence[Callable[[], Any]]) -> list[float]:
        """Calls functions one after the other, and returns the host's seconds of each.

        It then waits for the device: a host that finds the queue of kernels full would wait within a call.
        """
        marks = [time.perf_counter()]
        for function in functions:
            function()
            marks.append(time.perf_counter())
        self._synchronize()
        return [end - begin for begin, end in pairwise(marks)]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _on_host(self, function: Callable[[], Any], calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            function()
        self._synchronize()
        return (time.perf_counter() - began) / calls

    def _on_gpu(self, function: Callable[[], Any], calls: int) -> float:
        calls = min(calls, _QUEUED)
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        # As long in all processes: others would wait for one that is kept waiting longer, in the first collective.
        launching = self._most(time.perf_counter() - began) * calls
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        delay_gpu(int(launching * _CYCLES))  # keeps the device waiting until all calls are launched
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def _mean(self, value: float) -> float:
        """Returns the mean over processes, the same in all, since they must agree on the number of calls."""
        if self.world == 1:
            return value
        return self._together(value, dist.ReduceOp.SUM) / self.world

    def _most(self, value: float) -> float:
        """Returns the maximum over processes."""
        return value if self.world == 1 else self._together(value, dist.ReduceOp.MAX)

    def _together(self, value: float, how: dist.ReduceOp.RedOpType) -> float:
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(total, how)
        return total.item()


def _operations(function: Callable[[], Any]) -> int:
    """Returns the number of operations of a call."""
    with _Operations() as operations:
        function()
    return operations.number


class _Operations(TorchDispatchMode):
    """Counts operations in the same way as the simulation: views, too, but no reads of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is not READ_SCALAR.default
        return func(*args, **(kwargs or {}))
