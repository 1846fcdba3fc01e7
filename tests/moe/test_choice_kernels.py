"""The Triton kernel chooses what ``choice.py`` does, on a GPU if there is one, otherwise in an interpreter."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.torch_version import TorchVersion

HAS_GPU = torch.cuda.is_available()


@pytest.mark.slow
def test_the_kernel_chooses_as_plain_torch_does() -> None:
    triton = pytest.importorskip("triton")
    if not HAS_GPU and TorchVersion(triton.__version__) < "3.7":  # compares versions, not strings
        pytest.skip("the interpreter of Triton 3.6 fails with today's NumPy")
    environment = os.environ | ({} if HAS_GPU else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "tests.moe.choice_kernels_errors", "cuda" if HAS_GPU else "cpu"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
    differing = json.loads(run.stdout)
    assert len(differing) == 7 * 2 * 2 + 1
    assert not {name: tokens for name, tokens in differing.items() if tokens}
