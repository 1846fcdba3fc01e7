"""Checks of this machine that need one process: versions, processors, memory and disk."""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from tedlab.doctor.finding import Finding, Verdict
from tedlab.launch.locks import Lock

_GIB, _MIB = 2**30, 2**20
_WRITTEN = 64 * _MIB
_LEAST_FREE = 5 * _GIB
_LEAST_SHARED = 64 * _MIB  # what Docker gives /dev/shm unless told otherwise; workers and NCCL need more
_SLOW_DISK = 50 * _MIB  # bytes per second
_PER_PROCESS = 0.6 * _GIB  # of torch and Lightning, before there is a model


def examine_machine(processes: int, accelerator: str, output: Path, share_gpus: bool = False) -> Iterator[Finding]:
    """Checks this machine for so many processes, one finding after another.

    Args:
        processes: How many run on this machine.
        accelerator: ``cpu`` or ``gpu``.
        output: Where run directories go.
        share_gpus: Whether several processes may use one GPU, as gloo lets them.
    """
    yield _versions()
    yield _processors(processes, accelerator, share_gpus)
    yield _memory(processes)
    yield _shared_memory(accelerator)
    yield _disk(output)


def unmet(package: str = "tedlab") -> list[str]:
    """Returns the requirements of a package, without extras, that this environment does not meet, in words."""
    found = []
    for text in requires(package) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            here = version(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(here, prereleases=True):
            found.append(f"{requirement.name} is {here}, not {requirement.specifier}")
    return found


def _versions() -> Finding:
    try:
        names = ", ".join(f"{name} {version(name)}" for name in ("tedlab", "torch", "lightning"))
        wrong = unmet()
    except PackageNotFoundError:
        return Finding(
            "versions", "tedlab is not installed", Verdict.WARNING, "pip install tedlab, or pip install -e ."
        )
    said = f"Python {platform.python_version()}, {names}"
    if wrong:
        return Finding("versions", f"{said}; {'; '.join(wrong)}", Verdict.WRONG, "pip install --upgrade tedlab")
    return Finding("versions", said)


def _processors(processes: int, accelerator: str, share_gpus: bool) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(device) for device in range(gpus)})
    called = f" ({', '.join(names)})" if names else ""
    said = f"{cores} cores, {gpus} GPUs{called}, for {processes} processes"
    if accelerator == "gpu" and (processes > gpus if not share_gpus else not gpus):
        return Finding(
            "devices", said, Verdict.WRONG, f"Use at most {gpus} processes, or comm.backend=gloo to share a GPU"
        )
    if accelerator == "cpu" and gpus:
        return Finding("devices", said, remedy="trainer=gpu tests the GPUs, which this run does not use")
    if accelerator == "cpu" and processes > 4 * cores:
        return Finding("devices", said, Verdict.WARNING, "So many processes on so few cores hardly move: use fewer")
    return Finding("devices", said)


def _memory(processes: int) -> Finding:
    free = available_memory()
    needed = processes * _PER_PROCESS
    said = f"{free / _GIB:.1f} GiB free; {processes} processes need {needed / _GIB:.1f} GiB before there is a model"
    if free < needed:
        return Finding("memory", said, Verdict.WRONG, "End other programs, or use fewer processes")
    return Finding("memory", said)


def available_memory() -> float:
    """Returns the bytes that programs may still take on this machine."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _shared_memory(accelerator: str) -> Finding:
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("shared memory", "there is no /dev/shm here")
    free = shutil.disk_usage(place).free
    said = f"{free / _GIB:.2f} GiB free in /dev/shm"
    if free <= _LEAST_SHARED and accelerator == "gpu":
        remedy = "NCCL and data workers need more: start the container with --shm-size=8g or --ipc=host"
        return Finding("shared memory", said, Verdict.WARNING, remedy)
    return Finding("shared memory", said)


def _disk(output: Path) -> Finding:
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".tedlab-doctor-", dir=place) as folder:
            rate = _write(Path(folder, "bytes"))
            lock = Lock.on(Path(folder, "lock"))
            second = Lock.on(Path(folder, "lock"))
            locks = lock is not None and second is None
            for held in (lock, second):
                if held is not None:
                    held.close()
    except OSError as error:
        return Finding("disk", f"{place}: {error}", Verdict.WRONG, "Choose another place for runs with hydra.run.dir")
    free = shutil.disk_usage(place).free
    said = f"{place}: {free / _GIB:.0f} GiB free, {_WRITTEN // _MIB} MiB written at {rate / _MIB:,.0f} MiB/s"
    if free < _LEAST_FREE:
        return Finding("disk", said, Verdict.WARNING, "Checkpoints take 12 to 16 bytes a parameter: free some space")
    if rate < _SLOW_DISK:
        return Finding("disk", said, Verdict.WARNING, "checkpoint.async_save=true writes while training goes on")
    if not locks:
        remedy = "Its file system has no locks: give every run a directory of its own"
        return Finding("disk", said, Verdict.WARNING, remedy)
    return Finding("disk", said)


def _write(file: Path) -> float:
    """Writes a file through to the disk, and returns bytes per second."""
    content = os.urandom(_MIB)
    start = time.perf_counter()
    with file.open("wb") as out:
        for _ in range(_WRITTEN // _MIB):
            out.write(content)
        out.flush()
        os.fsync(out.fileno())
    return _WRITTEN / (time.perf_counter() - start)
