"""Runs one process of a calibration, which measures, fits and writes the results."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tedlab.config import CalibrateConfig
from tedlab.console import output
from tedlab.launch.joining import join, local_world_size, own_device
from tedlab.launch.outside import started_outside
from tedlab.predict.calibrate.fit import fit
from tedlab.predict.calibrate.measure import SIZES, Bench
from tedlab.predict.calibrate.write import Facts, cluster_yaml, fit_table, picture
from tedlab.progress import CommandProgress


def calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Calibrates; runs in every process, the first of which writes ``config.out`` and a PNG beside it.

    Returns:
        ``out``, the file that was written, and ``gemm``, the FLOP/s of matrix products in the main dtype; an empty
        dictionary in all processes but the first.
    """
    device, out = _join(config.device or default_device()), Path(config.out)
    per_node = local_world_size()
    sizes = SIZES[device.type].shortened() if config.quick else SIZES[device.type]
    first = dist.get_rank() == 0
    with CommandProgress(disable=not first) as bar:
        task = bar.add_task("starting", total=None)
        bench = Bench(device, per_node, sizes, lambda what: bar.update(task, advance=1, description=what))
        bar.update(task, total=bench.timings())
        measured = bench.measure()
    dist.destroy_process_group()
    if not first:
        return {}
    facts = Facts(
        processes=bench.world,
        per_node=per_node,
        threads=torch.get_num_threads(),
        device=_device_name(device),
        memory_bytes=_memory_bytes(device, per_node),
        asynchronous=device.type == "cuda",
        main=bench.main,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(cluster_yaml(measured, facts))
    picture(measured, out.with_suffix(".png"))
    console = output()
    console.print(fit_table(measured, f"{facts.device}, {facts.processes} processes"))
    console.print(f"saved in {out} and {out.with_suffix('.png')}")
    return {"out": str(out), "gemm": fit(measured.products[bench.main]).rate}


def default_device() -> str:
    """Returns ``cuda`` if there is a GPU, otherwise ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _join(device: str) -> torch.device:
    """Initialises the process group and returns this process's device."""
    place = own_device(device)
    backend = "nccl" if place.type == "cuda" else "gloo"
    if "RANK" in os.environ or started_outside():
        join(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return place


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _memory_bytes(device: torch.device, per_node: int) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / per_node
