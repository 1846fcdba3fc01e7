"""Both ways of launching a collective give the same bits, leave inputs alone, and write only where they should."""

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from tedlab.comm.raw import _FUNCTIONAL, _IN_PLACE, Way, way_of
from tests.pool import WorkerPool

SENT = ([2, 0, 1], [1, 3, 0], [0, 1, 4])  # rows from each process to each


def results(way: Way, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    x = torch.randn(size * 2, 3, generator=torch.Generator().manual_seed(rank)).to(device, dtype)
    before = x.clone()
    uneven = x[: sum(SENT[rank])]
    gathered = torch.full((size * len(x), 3), -1.0, dtype=dtype, device=device)
    own = gathered[rank * len(x) : (rank + 1) * len(x)].copy_(x)
    waits = [
        way.all_reduce(x, "sum", group),
        way.all_reduce(x.mT, "max", group),
        way.all_to_all(x, None, None, group),
        way.all_to_all(uneven, [row[rank] for row in SENT], SENT[rank], group),
        way.reduce_scatter(x, group),
        way.all_gather(x, group),
        way.all_gather_into(gathered, own, group),
    ]
    found = [wait() for wait in waits]
    assert torch.equal(x, before)
    assert found[-1].data_ptr() == gathered.data_ptr()
    assert torch.equal(found[-1], found[-2])
    return found


def compare(dtype: torch.dtype) -> None:
    for ours, theirs in zip(results(_IN_PLACE, dtype), results(_FUNCTIONAL, dtype), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_collectives_in_place_equal_functional_ones(pool: WorkerPool, dtype: torch.dtype) -> None:
    pool.run(3, compare, dtype)


def on_cpu() -> bool:
    assert dist.group.WORLD is not None
    return way_of(torch.ones(1), dist.group.WORLD) is _FUNCTIONAL


def test_tensors_of_a_cpu_go_the_functional_way(pool: WorkerPool) -> None:
    assert pool.run(1, on_cpu) == [True]
