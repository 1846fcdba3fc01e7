"""Checks that need all processes of a layout: whether they find each other, clocks, speeds, every kind of group."""

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from tedlab.config import Backend, TrainConfig
from tedlab.degrees import GroupKind, parallel_degrees
from tedlab.doctor.finding import Finding, Verdict
from tedlab.launch.joining import join, local_rank
from tedlab.topology import Topology

TIMEOUT = timedelta(seconds=60)
_SMALL, _LARGE = 1, 2**20  # fp32 elements of the messages that measure latency and bandwidth
_REPEATS = 5
_PRODUCT = {"cpu": 256, "cuda": 4096}  # the width of the matrices that measure a device
_SKEWED = 1.0  # seconds between clocks
_SLOWER = 1.5  # times the median


@dataclass
class Group:
    """What collectives in the groups of one kind did.

    Attributes:
        size: Processes in a group.
        latency: Seconds of an all-reduce of four bytes, in the slowest process.
        bandwidth: Bytes per second of one of 4 MiB, in the slowest.
        wrong: The processes that got a wrong sum, or wrong rows from an all-to-all.
    """

    size: int
    latency: float
    bandwidth: float
    wrong: list[int] = field(default_factory=list)


def examine_world(config: TrainConfig, machine: Sequence[Finding] = ()) -> dict[str, Any]:
    """Runs in every process of a layout: measures, and returns what :func:`judge_world` reads.

    Args:
        config: The configuration of the layout.
        machine: What this process has found on its machine; one process of each machine looks.
    """
    device = torch.device("cpu")
    if config.trainer["accelerator"] != "cpu":
        device = torch.device("cuda", local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = _backend(config, device)
    join(backend, TIMEOUT)
    try:
        topology = Topology(parallel_degrees(config.parallel), device, timeout=TIMEOUT)
        own: dict[str, Any] = {"host": socket.gethostname(), "product": _product(device), "machine": [*machine]}
        dist.barrier()
        own["clock"] = time.time()
        for kind in topology.comm.sizes:
            if topology.comm.size(kind) > 1:
                own[kind] = _collectives(topology, kind, device)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        sizes = topology.comm.sizes
    finally:
        dist.destroy_process_group()
    return {"backend": backend, "processes": gathered, "sizes": sizes}


def judge_world(measured: Mapping[str, Any]) -> Iterator[Finding]:
    """Says what the measurements of :func:`examine_world` mean."""
    processes = measured["processes"]
    hosts = list(dict.fromkeys(process["host"] for process in processes))
    yield Finding(
        "processes", f"{len(processes)} found each other on {', '.join(hosts)}, through {measured['backend']}"
    )
    for process in processes[1:]:  # the first has told of its own machine
        yield from _elsewhere(process["host"], process.get("machine", ()))
    clocks = [process["clock"] for process in processes]
    skew = max(clocks) - min(clocks)
    said = f"at most {skew * 1e3:,.0f} ms apart, with the time that a barrier takes"
    if skew > _SKEWED:
        yield Finding("clocks", said, Verdict.WARNING, "Logs of nodes do not line up: let NTP set their clocks")
    else:
        yield Finding("clocks", said)
    yield _speeds([process["product"] for process in processes], [process["host"] for process in processes])
    for kind, size in measured["sizes"].items():
        if size > 1:
            yield _judged(kind, groups(processes, kind, size))


def _elsewhere(host: str, found: Sequence[Finding]) -> Iterator[Finding]:
    """Yields what is wrong on another machine, each with its name, or that nothing is."""
    bad = [finding for finding in found if finding.verdict in (Verdict.WARNING, Verdict.WRONG)]
    yield from (replace(finding, name=f"{finding.name} on {host}") for finding in bad)
    if found and not bad:
        yield Finding(f"machine {host}", ", ".join(finding.name for finding in found) + ": nothing is wrong")


def groups(processes: list[Mapping[str, Any]], kind: str, size: int) -> Group:
    """Puts together what the processes measured in their groups of one kind."""
    found = [process[kind] for process in processes]
    return Group(
        size,
        max(latency for latency, _, _ in found),
        min(bandwidth for _, bandwidth, _ in found),
        [rank for rank, (_, _, right) in enumerate(found) if not right],
    )


def _judged(kind: str, group: Group) -> Finding:
    name = f"groups: {kind}"
    said = f"{group.size} processes, {group.latency * 1e6:,.0f} µs, {group.bandwidth / 1e9:.2f} GB/s, results right"
    if not group.wrong:
        return Finding(name, said)
    ranks = ", ".join(map(str, group.wrong))
    remedy = "The network or a driver changes what is sent: try NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1, one at a time"
    return Finding(name, f"ranks {ranks} got wrong results", Verdict.WRONG, remedy)


def _speeds(rates: list[float], hosts: list[str]) -> Finding:
    middle, slowest = median(rates), min(range(len(rates)), key=rates.__getitem__)
    said = f"{middle / 1e9:,.0f} GFLOP/s in matrix products (median), {rates[slowest] / 1e9:,.0f} at least"
    if rates[slowest] * _SLOWER < middle:
        remedy = (
            f"All wait for rank {slowest} on {hosts[slowest]}: look for other programs, heat, or a capped clock there"
        )
        return Finding("speed", said, Verdict.WARNING, remedy)
    return Finding("speed", said)


def _backend(config: TrainConfig, device: torch.device) -> str:
    if config.comm.backend is not None:
        return str(Backend(config.comm.backend).value)
    return "nccl" if device.type == "cuda" else "gloo"


def _product(device: torch.device) -> float:
    """Returns FLOP/s of matrix products in fp32 (GPU: bf16)."""
    width = _PRODUCT[device.type]
    a = torch.ones(width, width, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        a @ a
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2 * width**3 / min(times)


def _collectives(topology: Topology, kind: GroupKind, device: torch.device) -> tuple[float, float, bool]:
    """Returns the seconds of a small all-reduce, bytes per second of a large one, and whether results are right."""
    group, size, rank = topology.comm.group(kind), topology.comm.size(kind), topology.comm.rank(kind)
    x = torch.full((_SMALL,), float(rank + 1), device=device)
    dist.all_reduce(x, group=group)
    right = x.item() == size * (size + 1) / 2
    sent = torch.arange(size, device=device, dtype=torch.float32) + size * rank
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    right = right and torch.equal(received, torch.arange(size, device=device, dtype=torch.float32) * size + rank)
    seconds = {}
    for elements in (_SMALL, _LARGE):
        buffer, times = torch.zeros(elements, device=device), []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            dist.all_reduce(buffer, group=group)
            _wait(device)
            times.append(time.perf_counter() - start)
        seconds[elements] = median(times)
    return seconds[_SMALL], 4 * _LARGE / seconds[_LARGE], right


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
