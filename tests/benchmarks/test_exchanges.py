"""What ``benchmarks.exchanges`` times brings each part where it belongs."""

import pytest
import torch

from tests.pool import WorkerPool


def in_each_process() -> list[set[str]]:
    from benchmarks.exchanges import timed

    return [set(timed(way, 1 / 64, torch.device("cpu"))) for way in ("all_to_all", "gather", "reduce_scatter")]


def test_collectives_are_timed_if_their_results_are_right(pool: WorkerPool) -> None:
    pytest.importorskip("triton")
    assert pool.run(2, in_each_process) == [[{"way", "mib", "ms", "gb_per_s"}] * 3] * 2
