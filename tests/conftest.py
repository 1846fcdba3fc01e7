"""Fixtures that every test may use."""

import pytest

from tests.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> WorkerPool:
    """The server of worker processes that all tests share."""
    return WorkerPool()
