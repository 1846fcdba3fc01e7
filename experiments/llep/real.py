"""A real run on emulated links: one layer on two processes, with nine tenths of its tokens at one of them.

Two times are measured: that on the clock, which is right if each process has a core to itself; and the processor time
of the busier process with the time of its links, which does not depend on what else the machine does.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from tedlab import ParallelDegrees, Topology
from tedlab.config import LendConfig, MoEConfig
from tedlab.moe import RowExperts, mixtures
from tedlab.moe.experts import ExpertsSpec
from tedlab.moe.router import RouterReport, Routing
from tedlab.moe.slots import sort_choices
from tedlab.nn import FeedForwardSpec, Init, initialize
from tedlab.predict.cluster import load_cluster
from tedlab.predict.emulate import Emulation

PROCESSES, EXPERTS, HIDDEN, FFN, TOKENS, STEPS = 2, 8, 64, 4096, 8192, 5
DILATION = 13_000  # a core has some 30 GFLOP/s in fp32, an H200 791 TFLOP/s in numbers of half as many bytes


def measured() -> dict[str, Any]:
    """Seconds of a forward and backward pass of one layer on two processes, with and without lending, in turns."""
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        multiprocessing.spawn(_worker, (str(store), str(directory)), nprocs=PROCESSES)
        return dict(torch.load(Path(directory) / "0.pt"))


def _worker(rank: int, store: str, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    topology = Topology(ParallelDegrees(PROCESSES, 1, PROCESSES))
    links = Emulation(load_cluster("dgx_h200"), topology.comm.ranks, DILATION)
    topology.comm.register_hook(links)
    layers = {name: _layer(topology, lend) for name, lend in (("home", LendConfig()), ("lent", _SMALL))}
    x, routing = _skewed(rank)
    taken: dict[str, list[float]] = {name: [] for name in layers}
    busy: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(STEPS):
        for name, layer in layers.items():
            dist.barrier()
            start, worked, sent = time.perf_counter(), time.process_time(), sum(links.seconds.values())
            layer(x.requires_grad_(), routing).sum().backward()
            own = time.process_time() - worked + DILATION * (sum(links.seconds.values()) - sent)
            dist.barrier()
            taken[name].append(time.perf_counter() - start)
            everybody: list[float] = [0.0] * PROCESSES
            dist.all_gather_object(everybody, own)
            busy[name].append(max(everybody))
    medians = {f"{name}/seconds": statistics.median(times[1:]) for name, times in taken.items()}
    medians |= {f"{name}/busy_seconds": statistics.median(times[1:]) for name, times in busy.items()}
    rows = {f"{name}/rows": layer.moved.computed // STEPS for name, layer in layers.items()}
    if rank == 0:
        speedup = medians["home/busy_seconds"] / medians["lent/busy_seconds"]
        torch.save(
            {**medians, **rows, "speedup": speedup, "bound": rows["home/rows"] / rows["lent/rows"]},
            Path(directory) / "0.pt",
        )
    dist.destroy_process_group()


_SMALL = LendConfig("llep", minimum=1)


def _layer(topology: Topology, lend: LendConfig) -> RowExperts:
    config = MoEConfig(num_experts=EXPERTS, top_k=2, dispatch="dropless", lend=lend)
    spec = ExpertsSpec(FeedForwardSpec(HIDDEN, FFN, Init(std=0.02), Init(std=0.02)), config)
    layer = mixtures["dropless"].make(spec, topology)
    assert isinstance(layer, RowExperts)
    initialize(layer, seed=0)
    return layer


def _skewed(rank: int) -> tuple[Tensor, Routing]:
    """Tokens of which nine in ten choose two experts of the first process."""
    draw = torch.Generator().manual_seed(rank)
    likes = torch.rand(TOKENS, EXPERTS, generator=draw)
    likes[: TOKENS * 9 // 10, :2] += 1
    place, choice, load = sort_choices(likes.argsort(-1, descending=True)[:, :2], EXPERTS)
    zero = torch.zeros(())
    gates = torch.full((TOKENS, 2), 0.5)
    return torch.randn(TOKENS, HIDDEN, generator=draw), Routing(
        gates, place, choice, RouterReport(zero, zero, load, zero)
    )
