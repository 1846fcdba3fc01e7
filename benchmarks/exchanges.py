"""Bare exchanges: NCCL's beside those that read other GPUs' symmetric memory, without anything around them.

    python -m benchmarks.exchanges --processes 4                         # on four GPUs, in a minute
    python -m benchmarks.exchanges --tiny --ways all_to_all gather       # with gloo, to see that it works

Each process has a buffer of the given size, of which each process gets an equal part. See README.md.
"""

import argparse
import itertools
import json
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from benchmarks.steps import Clock
from benchmarks.surroundings import surroundings
from tedlab.launch.launcher import launch

WARM_UP, REPEATS, CALLS = 2, 7, 10  # measurements, and calls in each
MIB = (16, 64, 256, 512)
Exchange = tuple[Callable[[], Any], Tensor]  # what is timed, and where its result is


@dataclass(frozen=True)
class Job:
    """What each process is told: the ways, and the sizes in MiB."""

    ways: tuple[str, ...]
    mib: tuple[float, ...]
    output_dir: str = "."


@triton.jit
def _read(out, addresses, rank, part, n: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copies the part for this rank out of each process's buffer, from the next process first."""
    other = (rank + 1 + tl.program_id(0)) % n
    at = tl.program_id(1) * block + tl.arange(0, block)
    source = tl.multiple_of(tl.load(addresses + other).to(tl.pointer_type(tl.int64)), 16)
    tl.store(out + other * part + at, tl.load(source + rank * part + at, mask=at < part), mask=at < part)


def all_to_all(x: Tensor) -> Exchange:
    """NCCL's all-to-all."""
    out = torch.empty_like(x)
    return lambda: dist.all_to_all_single(out, x), out


def gather(x: Tensor) -> Exchange:
    """NCCL's all-gather to a buffer of this size, as comm.dedup=group has it: as much leaves as in an all-to-all."""
    n, rank = dist.get_world_size(), dist.get_rank()
    out, mine = torch.empty_like(x), x.chunk(n)[rank]
    return lambda: dist.all_gather_into_tensor(out, mine), out


def reduce_scatter(x: Tensor) -> Exchange:
    """NCCL's reduce-scatter of a buffer of this size."""
    out = torch.empty_like(x.chunk(dist.get_world_size())[0])
    return lambda: dist.reduce_scatter_tensor(out, x), out


def vdev(x: Tensor, copied: bool = False) -> Exchange:
    """torch's all-to-all over NVSHMEM, whose splits stay on the device."""
    import torch.distributed._symmetric_memory as symmetric

    symmetric.set_backend("NVSHMEM")
    n, name = dist.get_world_size(), dist.group.WORLD.group_name  # type: ignore[union-attr]
    source, out = (symmetric.empty(x.numel(), dtype=x.dtype, device=x.device) for _ in range(2))
    sent, arrived = (symmetric.empty(*shape, dtype=torch.int64, device=x.device) for shape in ((n,), (2, n)))
    source.copy_(x)
    sent.fill_(x.numel() // n)
    for tensor in (source, out, sent, arrived):
        symmetric.rendezvous(tensor, name)

    def run() -> None:
        if copied:
            source.copy_(x)
        torch.ops.symm_mem.all_to_all_vdev(source, out, sent, arrived, name)

    return run, out


def read(x: Tensor, copied: bool = False, engine: bool = False) -> Exchange:
    """Reads of peers' memory between two barriers: by a Triton kernel, or by the GPU's copy engines."""
    import torch.distributed._symmetric_memory as symmetric

    n, rank = dist.get_world_size(), dist.get_rank()
    source, out = symmetric.empty(x.numel(), dtype=x.dtype, device=x.device), torch.empty_like(x)
    source.copy_(x)
    handle = symmetric.rendezvous(source, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    buffers = [handle.get_buffer(other, (x.numel(),), x.dtype) for other in range(n)]
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], device=x.device)
    part, block = x.numel() * x.element_size() // 8 // n, 8192
    grid = (n, triton.cdiv(part, block))

    def run() -> None:
        if copied:
            source.copy_(x)
        handle.barrier()
        if engine:
            for step in range(1, n + 1):
                other = (rank + step) % n
                out.chunk(n)[other].copy_(buffers[other].chunk(n)[rank])
        else:
            _read[grid](out.view(torch.int64), addresses, rank, part, n, block, num_warps=8)
        handle.barrier()

    return run, out


WAYS: dict[str, Callable[[Tensor], Exchange]] = {
    "all_to_all": all_to_all,
    "gather": gather,
    "reduce_scatter": reduce_scatter,
    "read": read,
    "copy and read": lambda x: read(x, copied=True),
    "engine": lambda x: read(x, engine=True),
    "vdev": vdev,
    "copy and vdev": lambda x: vdev(x, copied=True),
}


def timed(way: str, mib: float, device: torch.device) -> dict[str, Any]:
    """Returns milliseconds of a call, a median on the slowest process, and GB/s each way, or what went wrong."""
    n, rank = dist.get_world_size(), dist.get_rank()
    x = torch.arange(n, device=device).add(rank * n).bfloat16().repeat_interleave(int(mib * 2**19) // n)
    found: dict[str, Any] = {"way": way, "mib": mib}
    try:
        run, out = WAYS[way](x)
        taken = median([_seconds(run) for _ in range(WARM_UP + REPEATS)][WARM_UP:])
        begins = [part[0].item() for part in out.chunk(n)]
        expected = {"gather": [p * n + p for p in range(n)], "reduce_scatter": [sum(range(rank, n * n, n))] * n}
        if begins != expected.get(way, [p * n + rank for p in range(n)]):
            raise ValueError(f"wrong result: parts begin with {begins}")
    except Exception:
        return found | {"error": traceback.format_exc()}
    slowest = torch.tensor(taken, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    sent = x.numel() * x.element_size() * (n - 1) / n
    return found | {"ms": 1e3 * slowest.item(), "gb_per_s": sent / slowest.item() / 1e9}


def _seconds(run: Callable[[], Any]) -> float:
    clock = Clock()
    clock.mark("step")
    for _ in range(CALLS):
        run()
    clock.mark("step")
    return clock.measured(1, 0, 0.0).seconds[0] / CALLS


def measure(job: Job) -> dict[str, Any]:
    """Runs in each process and returns what was measured; the first process prints it line by line."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=30))
    found: list[dict[str, Any]] = []
    for way, mib in itertools.product(job.ways, job.mib):
        if any(row["way"] == way for row in found if "error" in row):
            continue
        found.append(timed(way, mib, device))
        if dist.get_rank() == 0:
            last = found[-1]
            said = last.get("error") or f"{last['ms']:8.3f} ms {last['gb_per_s']:7.1f} GB/s each way"
            print(f"{dist.get_world_size()} processes, {way:>14} {mib:6.1f} MiB: {said}", flush=True)
    dist.destroy_process_group()
    return {"rows": found}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exchanges",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=2, help="as many GPUs (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="default: all")
    parser.add_argument("--tiny", action="store_true", help="small buffers on CPUs")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    # One world each for those that share a kind of symmetric memory, which a process cannot change.
    for ways in ([way for way in arguments.ways if ("vdev" in way) == nvshmem] for nvshmem in (False, True)):
        job = Job(tuple(ways), (1 / 16, 1) if arguments.tiny else MIB)
        try:
            found += launch(measure, job, arguments.processes)["rows"] if ways else []
        except Exception:
            print(traceback.format_exc(), flush=True)
    if arguments.out is not None:
        facts = surroundings(torch.device("cpu" if arguments.tiny else "cuda"))
        arguments.out.write_text(json.dumps(facts | {"processes": arguments.processes, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
