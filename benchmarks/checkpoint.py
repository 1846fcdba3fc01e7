"""What checksums cost a checkpoint: ``python -m benchmarks.checkpoint``.

One process saves and loads a model in fp32 with AdamW's two moments, in turns with and without checksums, and the hash
functions of the standard library are timed beside them.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.surroundings import surroundings
from tedlab import Topology, checkpoint
from tedlab.checkpoint import directory
from tedlab.checkpoint.manifest import File, Manifest, measure

_GIB = 2**30
_TENSORS = 64


def seconds(task: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    began = time.perf_counter()
    task()
    return time.perf_counter() - began


def unmeasured(path: Path) -> File:
    """In the place of ``measure``: no checksum."""
    return File(path.stat().st_size, "")


def timed(folder: Path, gib: float, repeats: int) -> dict[str, list[float]]:
    """Seconds of every save and load. Each load reads from the file cache what has just been written."""
    elements = int(gib * _GIB / 4 / 3 / _TENSORS)
    kinds = ("model", "exp_avg", "exp_avg_sq")
    tensors: dict[str, Any] = {kind: {f"{i}": torch.randn(elements) for i in range(_TENSORS)} for kind in kinds}
    path = folder / "step_1.ckpt"
    times: dict[str, list[float]] = {}
    for _ in range(repeats + 1):
        for name in ("with", "without"):
            with mock.patch.object(directory, "measure", measure if name == "with" else unmeasured):
                saved = seconds(lambda: checkpoint.save(tensors, {"global_step": 1}, path))
            check = Manifest.check if name == "with" else lambda *_: None
            with mock.patch.object(Manifest, "check", check):
                loaded = seconds(lambda: checkpoint.load(tensors, path))
            times.setdefault(f"save {name}", []).append(saved)
            times.setdefault(f"load {name}", []).append(loaded)
            shutil.rmtree(path)
    return {name: values[1:] for name, values in times.items()}  # the first round warms up


def hashes() -> dict[str, float]:
    """GB/s of one core, in memory."""
    content = os.urandom(1 << 26)
    functions: dict[str, Callable[[bytes], Any]] = {"crc32": zlib.crc32, "sha256": hashlib.sha256}
    functions["blake2b"] = hashlib.blake2b
    best = {name: min(seconds(partial(hashed, content)) for _ in range(5)) for name, hashed in functions.items()}
    return {name: len(content) / taken / 1e9 for name, taken in best.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=3.0, help="size of the checkpoint")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured; default: a temporary one")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    Topology.single()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        times = timed(Path(folder), options.gib, options.repeats)
    dist.destroy_process_group()
    medians = {name: statistics.median(values) for name, values in times.items()}
    table = Table(title=f"{options.gib:g} GiB, one process", title_justify="left")
    for heading in ("", "with checksums, s", "without, s", "difference"):
        table.add_column(heading, justify="right" if heading else "left")
    for what in ("save", "load"):
        ours, plain = medians[f"{what} with"], medians[f"{what} without"]
        table.add_row(what, f"{ours:.2f}", f"{plain:.2f}", f"{ours - plain:+.2f} s, {ours / plain - 1:+.0%}")
    speeds = hashes()
    table.caption = "GB/s of one core: " + ", ".join(f"{name} {speed:.2f}" for name, speed in speeds.items())
    Console().print(table)
    if options.out is not None:
        report = {**surroundings(torch.device("cpu")), "gib": options.gib, "seconds": times, "gb_per_s": speeds}
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
