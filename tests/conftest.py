"""Fixtures that every test may use."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tedlab import Topology
from tests.deaths import (  # noqa: F401 (pytest's hooks)
    pytest_configure,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_unconfigure,
)
from tests.pool import WorkerPool

torch.set_num_threads(1)  # tests run beside each other: threads that wait for a core spin, and take it from others


@pytest.fixture(scope="session")
def pool() -> WorkerPool:
    """The server of worker processes that all tests share."""
    return WorkerPool()


@pytest.fixture(scope="module")
def single() -> Iterator[Topology]:
    """A world of this process alone."""
    yield Topology.single()
    dist.destroy_process_group()


_OF_LIBRARIES = {"PYTEST_CURRENT_TEST", "WANDB_SILENT", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"}  # they set these


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fails a test after which the environment is another, or a process group is there that was not there before.

    Whatever test comes next would depend on it. What a test sets with ``monkeypatch`` is taken back before this looks.
    """
    before, grouped = dict(os.environ), dist.is_initialized()
    yield
    now = dict(os.environ)
    names = (before.keys() | now.keys()) - _OF_LIBRARIES
    changed = sorted(name for name in names if before.get(name) != now.get(name))
    left = [f"{name} in the environment" for name in changed]
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    if dist.is_initialized() and not grouped:
        dist.destroy_process_group()
        left.append("a process group")
    if left:
        pytest.fail(f"this test leaves something behind: {', '.join(left)}")
