"""Runs a program that compares Triton kernels with plain torch: on a GPU if there is one, else in an interpreter."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

HAS_GPU = torch.cuda.is_available()


def printed_by(module: str, failing: str) -> dict[str, Any]:
    """Returns the JSON that a module prints; skips the test where Triton's interpreter fails at what it does.

    Args:
        module: The module, which takes the device as its argument.
        failing: What the interpreter of Triton 3.6 fails at.
    """
    triton = pytest.importorskip("triton")
    if not HAS_GPU and TorchVersion(triton.__version__) < "3.7":  # compares versions, not strings
        pytest.skip(f"the interpreter of Triton 3.6 fails with today's NumPy{failing}")
    environment = os.environ | ({} if HAS_GPU else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", module, "cuda" if HAS_GPU else "cpu"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
    printed: dict[str, Any] = json.loads(run.stdout)
    return printed
