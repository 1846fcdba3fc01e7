"""One process in a group of its own, for tests of files."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tedlab import Topology


@pytest.fixture(scope="module")
def single() -> Iterator[Topology]:
    yield Topology.single()
    dist.destroy_process_group()
