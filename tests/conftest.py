"""Fixtures that every test may use."""

from collections.abc import Iterator

import pytest

from tests.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """The worker processes that all tests share."""
    pool = WorkerPool()
    yield pool
    pool.close()
