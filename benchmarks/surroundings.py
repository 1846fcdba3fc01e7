"""What a benchmark compares with must be there; and what its JSON file says besides figures."""

import importlib.util
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def require(peer: str) -> None:
    """Raises SystemExit if this package, which is also the name of tedlab's extra that has it, is not installed."""
    if importlib.util.find_spec(peer) is None:
        raise SystemExit(f"this benchmark runs {peer} too, which is not installed here: pip install -e '.[{peer}]'")


def surroundings(device: torch.device, *peers: str) -> dict[str, Any]:
    """When, on what, and with which versions of tedlab, what it runs on, and the packages it is compared with."""
    versions = {"python": platform.python_version()}
    for package in ("tedlab", "torch", "triton", *peers):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # Triton, where there is no GPU
            continue
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
