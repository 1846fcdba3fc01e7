"""What ``benchmarks.train_step`` says of a profile."""

import re
from pathlib import Path

import tedlab.moe
from benchmarks.train_step import KINDS, OTHERS, by_kind, exposed, idle


def test_a_device_is_idle_where_no_kernel_runs_and_beside_a_longer_one_it_is_not() -> None:
    spans = [(0.0, 1000.0, "exchange"), (100.0, 200.0, "product"), (1500.0, 1600.0, "sum"), (1900.0, 2000.0, "sum")]
    assert idle(spans, 1) == ["     0.80 ms idle", "     0.50 ms      1 × exchange → sum"]
    assert idle([], 5) == ["     0.00 ms idle"]


def test_an_exchange_is_exposed_where_no_other_kernel_runs() -> None:
    """0 to 1000 µs: products from 100 to 300, two of which overlap, and from 900; the second exchange is hidden."""
    exchange, sums = "ncclDevKernel_SendRecv(args)", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(args)"
    spans = [(0.0, 1000.0, exchange), (100.0, 250.0, "product"), (200.0, 300.0, "product"), (900.0, 2000.0, "product")]
    spans += [(1100.0, 1300.0, exchange), (1950.0, 2150.0, sums), (2100.0, 2200.0, exchange)]
    assert exposed(spans) == [
        "     0.80 ms of 1.30 alone: ncclDevKernel_SendRecv",
        "     0.15 ms of 0.20 alone: ncclDevKernel_AllReduce_Sum_f32_RING_LL",
    ]
    assert exposed([(0.0, 1.0, "product")]) == []


def test_kernels_are_divided_by_what_they_do() -> None:
    names = ["ncclDevKernel_SendRecv(args)", "_combine_backward", "_take", "_scatter_gather_elementwise_kernel<128>"]
    names += ["_ZN7cutlass13device_kernel", "nvjet_sm90_tst", "void cudnn::fusion::convert<true>", "_adam", "_take"]
    found = by_kind((name, 2.0**place) for place, name in enumerate(names))
    rows = 2 + 4 + 256
    assert [*found.values()] == [1, 16, 32 + 64, rows, 128, 8]
    assert [*found] == [*KINDS, OTHERS]


def test_kernels_of_rows_are_known_by_name() -> None:
    (folder,) = tedlab.moe.__path__
    sources = [Path(folder, f"{name}_kernels.py").read_text() for name in ("row", "index")]
    launched = {name for source in sources for name in re.findall(r"\b(_\w+)\[\(", source)}
    assert len(launched) > 5
    assert all(name.startswith(KINDS["kernels of rows"]) for name in launched)
