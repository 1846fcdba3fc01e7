"""Fixtures that every test may use. The process that only hands out tests to others imports no torch."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.deaths import (  # noqa: F401 (pytest's hooks)
    pytest_configure,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_unconfigure,
)
from tests.pool import WorkerPool

if TYPE_CHECKING:
    from tedlab import Topology

os.environ.pop("COLUMNS", None)  # readline tells processes that pytest starts of a terminal with 80

settings.register_profile("no deadline", deadline=None)  # an example that waits for other programs proves nothing
settings.load_profile("no deadline")

LONGEST = (  # files of more than a quarter of a minute, of which two processes had better not start one at the end
    *("certify/test_matrix.py", "comm/test_ledger.py", "test_train.py", "certify/test_planted_bugs.py"),
    *("predict/sim/test_simulation.py", "launch/test_launch.py", "test_tutorials.py", "test_guests.py"),
    *("test_documents.py", "test_chaos.py", "test_oracle.py", "test_checkpoint.py", "lightning/test_restore.py"),
    *("test_wheel.py", "predict/plan/test_plan.py", "predict/test_estimate.py", "models/test_attention.py"),
    *("test_online.py", "test_readme.py", "optim/test_sharded.py", "moe/test_folding.py", "test_parity.py"),
    *("models/test_families.py", "test_validate.py", "comm/test_overlap.py", "moe/test_padding.py"),
    *("lightning/test_arguments.py", "test_cli.py", "test_notebooks.py", "certify/test_regressions.py", "test_conf.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; the others stay in order."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Garbage collections need not look through what has been imported and collected: it stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run beside each other: threads that wait for a core spin, and take it from others."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def compositions() -> Iterator[None]:
    """Hydra reads the files of a choice of presets once."""
    from tests.compositions import remembered

    with remembered():
        yield


@pytest.fixture(scope="session")
def pool() -> WorkerPool:
    """The server of worker processes that all tests share."""
    return WorkerPool()


@pytest.fixture(scope="module")
def single() -> "Iterator[Topology]":
    """A world of this process alone."""
    import torch.distributed as dist

    from tedlab import Topology

    yield Topology.single()
    dist.destroy_process_group()


_OF_LIBRARIES = {  # they set these
    "PYTEST_CURRENT_TEST",
    "WANDB_SILENT",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "TRITON_PTXAS_PATH",
    "HF_XET_HIGH_PERFORMANCE",
}


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fails a test after which the environment is another, or a process group is there that was not there before.

    Whatever test comes next would depend on it. What a test sets with ``monkeypatch`` is taken back before this looks.
    """
    import torch.distributed as dist

    from tedlab._compat.torch import forget_meshes

    before, grouped = dict(os.environ), dist.is_initialized()
    if not grouped:
        forget_meshes()  # of earlier tests
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
