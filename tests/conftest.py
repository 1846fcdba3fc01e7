"""Fixtures that every test may use."""

import pytest
import torch

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
