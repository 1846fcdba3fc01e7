"""What one optimizer step costs, untiled, tiled and fused: time, bandwidth and temporary memory.

See ``python -m benchmarks.optimizer --help``, and README.md for what is compared with what.
"""

import argparse
import json
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.surroundings import surroundings
from tedlab import Topology
from tedlab.optim import ShardedOptimizer

PAPER_TILE = 1_800_000  # elements, paper §4.2
WARM_UP = 3  # untimed steps: they allocate the state and compile the kernel
MIB = 1 << 20


@dataclass
class Contender:
    """One way to take a step. ``prepare`` hands it the gradient and is not measured."""

    name: str
    prepare: Callable[[], None]
    step: Callable[[], Any]


@dataclass
class Row:
    """What was measured of one contender."""

    name: str
    milliseconds: float  # median
    speedup: float  # over the untiled step
    gigabytes_per_second: float  # of the traffic that cannot be avoided
    of_copy: float  # share of the bandwidth of a plain copy
    temporary_bytes: int  # peak of what the step allocates, less what was there before


class Temporaries(TorchDispatchMode):
    """Counts the bytes of storages that operations create while it is active, as they come and go.

    What a kernel allocates and frees inside is not seen; none of Adam's CPU kernels does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in known:
                known.add(storage._cdata)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def contenders(elements: int, device: torch.device, dtype: torch.dtype) -> list[Contender]:
    """The three steps of ours, torch's own, and a copy that moves as many bytes as a step must."""
    torch.manual_seed(0)
    topology = Topology.single(device)

    def ours(tile: int | str | None) -> Contender:
        parameter = nn.Parameter(torch.randn(elements, dtype=dtype, device=device))
        optimizer = ShardedOptimizer(AdamW([parameter]), topology.comm, {parameter: "all"}, zero=True, tile=tile)
        (bucket,) = optimizer.buckets
        gradient = torch.randn_like(bucket.shard)

        def prepare() -> None:
            bucket.gradient = gradient
            bucket.present.add(parameter)
            optimizer.global_norm()  # which a step would take, and which is the same for all

        return Contender(f"tile={'null' if tile is None else tile}", prepare, optimizer.step)

    def peer() -> Contender:
        parameter = nn.Parameter(torch.randn(elements, device=device, dtype=_state_dtype(dtype)))
        parameter.grad = torch.randn_like(parameter)
        return Contender("torch's fused AdamW", _nothing, AdamW([parameter], fused=True).step)

    def copy() -> Contender:
        source = torch.zeros(bytes_per_parameter(dtype) * elements // 8, device=device)  # 4 bytes in, 4 out
        target = torch.zeros_like(source)
        return Contender("copy", _nothing, lambda: target.copy_(source))

    return [ours(None), ours(PAPER_TILE), ours("fused"), peer(), copy()]


def _nothing() -> None:
    """What a contender prepares whose gradient stays."""


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else dtype


def bytes_per_parameter(dtype: torch.dtype) -> int:
    """What a step must move: gradient in; master copy and two moments in and out; a half-precision parameter out."""
    rounded = dtype.itemsize if dtype != _state_dtype(dtype) else 0
    return dtype.itemsize + 6 * _state_dtype(dtype).itemsize + rounded


def seconds(contender: Contender, device: torch.device) -> float:
    """Of one step, from its call until the device is done."""
    contender.prepare()
    _synchronize(device)
    start = time.perf_counter()
    contender.step()
    _synchronize(device)
    return time.perf_counter() - start


def temporary_bytes(prepare: Callable[[], object], step: Callable[[], object], device: torch.device) -> int:
    """Peak of what one step, prepared, allocates beyond what is there before it."""
    prepare()
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with Temporaries() as temporaries:
        step()
    return temporaries.peak


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(elements: int, device: torch.device, dtype: torch.dtype, repeats: int) -> list[Row]:
    """Steps everybody in turn, so that whatever else the machine does hits all alike."""
    everybody = contenders(elements, device, dtype)
    times: dict[str, list[float]] = {c.name: [] for c in everybody}
    for repeat in track(range(-WARM_UP, repeats), "Stepping", transient=True):
        for contender in everybody:
            taken = seconds(contender, device)
            if repeat >= 0:
                times[contender.name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    untiled, copy = medians[everybody[0].name], medians[everybody[-1].name]
    return [
        Row(
            name=c.name,
            milliseconds=medians[c.name] * 1e3,
            speedup=untiled / medians[c.name],
            gigabytes_per_second=bytes_per_parameter(dtype) * elements / medians[c.name] / 1e9,
            of_copy=copy / medians[c.name],
            temporary_bytes=temporary_bytes(c.prepare, c.step, device),
        )
        for c in everybody
    ]


def table(rows: list[Row], elements: int, title: str) -> Table:
    """For people."""
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("step", "temp. MiB", "bytes each", "ms", "speedup", "GB/s", "of copy"):
        first = column == "step"
        result.add_column(column, justify="left" if first else "right", no_wrap=first)
    for row in rows:
        result.add_row(
            row.name,
            f"{row.temporary_bytes / MIB:.2f}",
            f"{row.temporary_bytes / elements:.2f}",
            f"{row.milliseconds:.2f}",
            f"{row.speedup:.2f}",
            f"{row.gigabytes_per_second:.1f}",
            f"{row.of_copy:.0%}",
        )
    return result


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer", description=__doc__)
    parser.add_argument("--elements", type=int, default=20_000_000, help="parameters (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32", "float64"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=21, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    rows = measure(arguments.elements, device, dtype, arguments.repeats)
    facts = surroundings(device)
    size = f"{arguments.elements:,} {arguments.dtype} parameters, {bytes_per_parameter(dtype)} bytes each to move"
    Console().print(table(rows, arguments.elements, f"{size}; {facts['device']}"))
    if arguments.out is not None:
        settings = {"elements": arguments.elements, "dtype": arguments.dtype, "repeats": arguments.repeats}
        everything = facts | settings | {"rows": [asdict(row) for row in rows]}
        arguments.out.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
