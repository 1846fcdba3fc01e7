"""Fixtures that every test may use."""

import pytest

from tests.deaths import (  # noqa: F401 (pytest's hooks)
    pytest_configure,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_unconfigure,
)
from tests.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> WorkerPool:
    """The server of worker processes that all tests share."""
    return WorkerPool()
