"""What is measured becomes a cluster file that predicts it: fit, file, command line, and a whole calibration."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from tedlab.comm.collectives import Operation
from tedlab.commands.calibrate import checked
from tedlab.config import CalibrateConfig
from tedlab.errors import UsageError
from tedlab.predict.calibrate import measure
from tedlab.predict.calibrate.calibration import calibrate
from tedlab.predict.calibrate.fit import Line, Series, Table, fit, largest_error, largest_ratio
from tedlab.predict.calibrate.measure import SIZES, Bench, Group, Measured
from tedlab.predict.calibrate.write import Facts, cluster_yaml, fit_table, picture
from tedlab.predict.cluster import ClusterConfig, Dispatch, load_cluster
from tedlab.predict.cost import collective_seconds, waiting_seconds
from tedlab.predict.sim.roofline import seconds, work_of
from tedlab.spec import Kernel, Work
from tedlab.topology import Topology
from tests.pool import WorkerPool

FLOPS = [1e6, 1e7, 1e8, 1e9]
BYTES = [1e4, 1e5, 1e6, 1e7]


def series(line: Line, amounts: list[float], unit: str = "B") -> Series:
    return Series("x", unit, "made up", amounts, [line.seconds(amount) for amount in amounts])


@pytest.mark.parametrize("line", [Line(2e-4, 1.5e9), Line(0.0, 3e10), Line(1e-6, 9e11)])
def test_a_fit_recovers_latency_and_rate(line: Line) -> None:
    found = fit(series(line, BYTES))
    assert found.rate == pytest.approx(line.rate)
    assert found.latency == pytest.approx(line.latency, abs=1e-12)
    assert largest_error(series(line, BYTES), found) < 1e-9


def test_small_amounts_count_as_much_as_large_ones() -> None:
    exact = series(Line(1e-3, 1e9), BYTES)
    noisy = Series("x", "B", "", exact.amounts, [*exact.seconds[:-1], exact.seconds[-1] * 1.1])
    assert fit(noisy).latency == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("timings", [[1e-3, 1.1e-2], [2e-3, 1e-3], [3e-3]], ids=["below 0", "falling", "one"])
def test_a_latency_is_never_negative_and_a_rate_always_positive(timings: list[float]) -> None:
    line = fit(Series("x", "B", "", [1e6, 1e7][: len(timings)], timings))
    assert line.latency == 0
    assert line.rate > 0


# ---- the file ------------------------------------------------------------------------------------------------------

PRODUCTS, ATTENTION = Line(1e-5, 1e11), Line(2e-5, 4e10)
MOVEMENT, ARITHMETIC = Line(3e-6, 3e10), Line(7e-6, 1e10)
REDUCE, EXCHANGE, OUTSIDE = Line(6e-4, 1e9), Line(5e-4, 2e9), Line(8e-4, 1e8)
WAITING = Line(2e-3, 1 / 1.05)
MEASURED = Measured(
    products={name: series(PRODUCTS, FLOPS, "FLOP") for name in ("fp64", "fp32", "fp16", "bf16")},
    attention=series(ATTENTION, FLOPS, "FLOP"),
    movement=series(MOVEMENT, BYTES),
    arithmetic=series(ARITHMETIC, BYTES),
    dispatch=Dispatch(2e-5, 1e-5, 3e-5),
    fresh=2e9,
    collectives={
        ("all_reduce", Group(4, 1)): series(REDUCE, BYTES),
        ("all_to_all", Group(4, 1)): series(EXCHANGE, BYTES),
        ("all_reduce", Group(2, 2)): series(OUTSIDE, BYTES),
    },
    waits={Group(4, 1): series(WAITING, [1e-2, 3e-2, 1e-1], "s")},
    kernels=[
        # At 128 rows 1 GFLOP/s, at 512 two.
        Table("grouped", "FLOP", "made up", [1e9, 4e9], [1.0, 2.0], [128, 512], 1024, "fp32"),
        Table("norm", "B", "made up", BYTES, [ARITHMETIC.seconds(size) / 2 for size in BYTES], BYTES),
    ],
)


@pytest.fixture
def cluster(tmp_path: Path) -> ClusterConfig:
    return written(tmp_path, asynchronous=True)


def written(folder: Path, asynchronous: bool) -> ClusterConfig:
    facts = Facts(8, 4, 1, "a machine", 8e9, asynchronous, "fp32", "2026-01-01")
    path = folder / "mine.yaml"
    path.write_text(cluster_yaml(MEASURED, facts))
    return load_cluster(path)


def test_the_file_predicts_what_was_measured(cluster: ClusterConfig) -> None:
    for kind, line in (("gemm", PRODUCTS), ("attention", ATTENTION)):
        for amount in FLOPS:
            assert seconds(Work(amount, 8, torch.float32, kind), cluster) == pytest.approx(line.seconds(amount), 1e-3)
    for kind, line in (("movement", MOVEMENT), ("arithmetic", ARITHMETIC)):
        assert seconds(Work(0, 1e6, torch.float32, kind), cluster) == pytest.approx(line.seconds(1e6), 1e-3)
    mapped = Work(0, 1e6, torch.float32, "movement", fresh=2e9)
    assert seconds(mapped, cluster) == pytest.approx(1 + MOVEMENT.seconds(1e6), 1e-3)
    for op, members, wire, line in (
        ("all_reduce", range(4), 1.5, REDUCE),
        ("all_to_all", range(4), 0.75, EXCHANGE),
        ("all_reduce", range(0, 8, 4), 1, OUTSIDE),
    ):
        assert collective_seconds(op, 1e6, members, cluster) == pytest.approx(line.seconds(wire * 1e6), 1e-3)


def test_the_file_has_what_kernels_reach_by_size(cluster: ClusterConfig) -> None:
    for size, taken in ((128, 1.0), (256, 0.5 + 1 / 6), (512, 0.5)):  # seconds of 1 GFLOP
        work = Work(1e9, 8, torch.float32, "gemm", kernel=Kernel("grouped", size, 2048))
        assert seconds(work, cluster) == pytest.approx(taken, 1e-3)
    for size in (*BYTES, 5e5):
        normed = Work(0, size, torch.float32, "arithmetic", kernel=Kernel("norm"))
        assert seconds(normed, cluster) == pytest.approx(ARITHMETIC.seconds(size) / 2, 1e-3)


def test_a_kernel_that_was_disturbed_is_left_out_and_its_table_says_how_far_it_is_off(tmp_path: Path) -> None:
    """4 MB took as long as 16 MB; 8 MB are 5/3 of what 2 MB and 16 MB say."""
    table = Table("norm", "B", "made up", [2e6, 4e6, 8e6, 16e6], [1.0, 8.5, 8 / 3 + 4, 8.0], [2e6, 4e6, 8e6, 16e6])
    text = cluster_yaml(
        replace(MEASURED, kernels=[table]), Facts(8, 4, 1, "a machine", 8e9, True, "fp32", "2026-01-01")
    )
    (tmp_path / "mine.yaml").write_text(text)
    (kernel,) = load_cluster(tmp_path / "mine.yaml").kernels.tables
    assert [rate.size for rate in kernel.rates] == [2e6, 8e6, 16e6]
    # Without it, 4 MB lie a third of the way from 2 MB to 8 MB, 1 + 17/9 s: 8.5 are 194 % more.
    assert "# made up; a size is within 194% of what others say; 1 slower than a larger one left out" in text


def test_the_file_says_how_long_a_rank_waits_for_the_slowest(cluster: ClusterConfig) -> None:
    assert waiting_seconds(0.4, range(4), cluster) == pytest.approx(2e-3 + 0.05 * 0.4, 1e-3)
    assert waiting_seconds(0.4, range(2), cluster) == 0  # not measured
    assert waiting_seconds(0.4, range(1), cluster) == 0


def test_where_the_host_computes_dispatch_has_small_kernels_latencies(tmp_path: Path) -> None:
    cluster = written(tmp_path, asynchronous=False)
    assert seconds(Work(0, 1e6, torch.float32, "movement"), cluster) == pytest.approx(1e6 / MOVEMENT.rate, 1e-3)
    assert seconds(Work(0, 1e6, torch.float32, "arithmetic"), cluster) == pytest.approx(1e6 / ARITHMETIC.rate, 1e-3)
    assert cluster.kernels.dispatch == MEASURED.dispatch
    assert "    collective: " not in (tmp_path / "mine.yaml").read_text()  # which was not measured
    table = fit_table(MEASURED, "measured")
    assert "the host, collective" not in table.columns[0].cells
    assert "the host, optimizer" in table.columns[0].cells


def test_large_results_are_fresh_memory() -> None:
    aten, x = torch.ops.aten, torch.empty(2**23 + 1)  # just above 32 MiB
    for func, operand, fresh in (
        (aten.exp.default, x, 4 * len(x)),
        (aten.exp_.default, x, 0),
        (aten.exp.default, x[1:], 4 * (len(x) - 1)),
        (aten.exp.default, x[2:], 0),
    ):
        work = work_of(func, (operand,), {}, func(operand))
        assert work is not None
        assert work.fresh == fresh


def test_groups_that_were_not_measured_go_by_the_links(cluster: ClusterConfig) -> None:
    steps = 2 * (2 - 1)  # of a ring of two inside a node
    expected = steps * REDUCE.latency / 6 + 1e6 / REDUCE.rate
    assert collective_seconds("all_reduce", 1e6, range(2), cluster) == pytest.approx(expected, 1e-3)
    assert cluster.between_nodes is not None
    assert cluster.between_nodes.bandwidth == pytest.approx(4 * OUTSIDE.rate)  # four rings left each node at once


def test_rates_whose_times_grow_less_than_the_files_digits_say_are_a_file_that_loads(tmp_path: Path) -> None:
    """100.04 and 100.06 bytes/s become 100.0 and 100.1, with which the larger message, which stays, is quicker."""
    close = Series("x", "B", "made up", [10004.0, 10007.0, 1e6], [100.0, 100.01, 1e3])
    measured = replace(MEASURED, collectives={**MEASURED.collectives, ("all_to_all", Group(4, 1)): close})
    path = tmp_path / "mine.yaml"
    path.write_text(cluster_yaml(measured, Facts(8, 4, 1, "a machine", 8e9, True, "fp32", "2026-01-01")))
    inside = load_cluster(path).in_node
    assert inside is not None
    assert [rate.bytes for rate in inside.all_to_all] == [10007, 1e6]


def test_the_spread_has_how_far_a_size_is_from_its_neighbours() -> None:
    """Where all lines and tables are straight, nothing is off; in eight others the middle takes 2 s instead of 1.5."""
    facts = Facts(8, 4, 1, "a machine", 8e9, True, "fp32", "2026-01-01")
    bent = Series("x", "B", "made up", [1e6, 2e6, 3e6], [1.0, 2.0, 2.0])
    several = {(op, Group(size, 1)): bent for op in get_args(Operation) for size in (2, 8)}
    measured = replace(MEASURED, collectives={**MEASURED.collectives, **several})
    assert "spread: 1  #" in cluster_yaml(MEASURED, facts)
    assert "spread: 1.333  #" in cluster_yaml(measured, facts)


def test_half_of_what_was_measured_is_as_far_off_as_twice() -> None:
    assert largest_ratio(Series("x", "B", "", [1.0, 2.0], [1.0, 4.0]), Line(0.0, 1.0)) == 2.0
    assert largest_ratio(Series("x", "B", "", [1.0, 2.0], [1.0, 1.0]), Line(0.0, 1.0)) == 2.0


def test_all_to_alls_of_groups_that_were_not_measured_go_by_the_sizes_that_were(cluster: ClusterConfig) -> None:
    """Those of four, inside a node: a pair's message takes what the four needed to send as many bytes each."""
    for sent in BYTES:
        assert collective_seconds("all_to_all", 2 * sent, range(2), cluster) == pytest.approx(
            EXCHANGE.seconds(sent), 1e-3
        )
    between = (EXCHANGE.seconds(1e5) + EXCHANGE.seconds(1e6)) / 2
    assert collective_seconds("all_to_all", 2 * 5.5e5, range(2), cluster) == pytest.approx(between, 1e-3)
    assert cluster.between_nodes is not None
    assert cluster.between_nodes.all_to_all == []  # no group had one rank on each node


SENT = [1e6, 2e6, 4e6, 8e6, 16e6]
DISTURBED = Series("x", "B", "5 sizes", SENT, [1e-3, 9e-3, 9.5e-3, 4e-3, 8e-3])


def with_disturbed(group: Group) -> Measured:
    several = {(op, group): DISTURBED for op in get_args(Operation)}
    return replace(MEASURED, collectives={**MEASURED.collectives, **several})


def test_a_message_that_was_slower_than_larger_ones_is_left_out_and_none_of_them(tmp_path: Path) -> None:
    text = cluster_yaml(with_disturbed(Group(2, 2)), Facts(8, 4, 1, "", 8e9, True, "fp32", "2026-01-01"))
    (tmp_path / "mine.yaml").write_text(text)
    cluster = load_cluster(tmp_path / "mine.yaml")
    (reduce,) = (it for it in cluster.collectives if it.op == "all_reduce" and it.nodes == 2)
    assert [rate.bytes for rate in reduce.rates] == [1e6, 8e6, 16e6]
    assert [rate.seconds for rate in reduce.rates] == pytest.approx([1e-3, 4e-3, 8e-3])
    assert cluster.between_nodes is not None
    assert [it.bytes for it in cluster.between_nodes.all_to_all] == [4e6, 32e6, 64e6]  # of a node's four ranks
    assert "op: all_reduce  # 5 sizes; 2 slower than a larger one left out" in text
    assert text.count("left out") == len(get_args(Operation)) + 1  # of each collective, and of the link


def test_a_size_that_is_left_out_counts_in_the_spread_as_what_is_predicted_for_it() -> None:
    """1 MB takes 1 ms and 8 MB 4 ms, so 10/7 are predicted for the 2 MB that took 9."""
    facts = Facts(8, 4, 1, "a machine", 8e9, True, "fp32", "2026-01-01")
    several = {key: DISTURBED for size in (2, 8) for key in with_disturbed(Group(size, 1)).collectives}
    assert "spread: 6.3  #" in cluster_yaml(replace(MEASURED, collectives=several, kernels=()), facts)


def test_every_figure_of_the_file_says_how_it_was_measured() -> None:
    text = cluster_yaml(MEASURED, Facts(1, 1, 2, "a machine", 8e9, True, "bf16", "2026-01-01"))
    assert [line for line in text.splitlines() if line[-1] not in ":" and "# " not in line] == []


def test_the_picture_is_one(tmp_path: Path) -> None:
    picture(MEASURED, tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_draws_what_is_predicted_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    group = Group(8, 1)
    picture(with_disturbed(group), tmp_path / "fit.png")
    (panel,) = (axes for axes in drawn[0].axes if axes.get_title() == "groups of 8 on 1 node(s)")
    marks, line = panel.lines[:2]
    assert len(marks.get_xdata()) == len(SENT)  # what is left out is shown
    path = tmp_path / "mine.yaml"
    path.write_text(cluster_yaml(with_disturbed(group), Facts(8, 8, 1, "a machine", 8e9, True, "fp32", "2026-01-01")))
    cluster = load_cluster(path)
    (measured,) = (it for it in cluster.collectives if (it.op, it.size) == (get_args(Operation)[0], 8))
    predicted = [sent / measured.seconds(sent) / 1e9 for sent in line.get_xdata()]
    assert list(line.get_ydata()) == pytest.approx(predicted, rel=1e-3)


# ---- the whole -----------------------------------------------------------------------------------------------------


def in_worker(config: CalibrateConfig) -> None:
    dist.destroy_process_group()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("RANK")
            patch.delenv("LOCAL_RANK")
            patch.setenv("LOCAL_WORLD_SIZE", "1")
            calibrate(config)
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_a_quick_calibration_of_this_machine(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(1, in_worker, CalibrateConfig(str(tmp_path / "mine.yaml"), quick=True, device="cpu"))
    cluster = load_cluster(tmp_path / "mine.yaml")
    assert cluster.in_node is None
    assert not cluster.kernels.asynchronous
    assert 1e8 < cluster.peak_flops.fp32 < 1e15
    assert 0 < cluster.kernels.dispatch.backward < 1e-2
    assert cluster.kernels.dispatch.views
    assert (tmp_path / "mine.png").exists()
    measured = {table.kernel for table in cluster.kernels.tables}  # no kernels that only GPUs have
    assert measured == {"attention", "attention_backward", "norm", "norm_backward", "narrowing", "widening"}


def bench() -> Bench:
    return Bench(torch.device("cpu"), 1, SIZES["cpu"].shortened(), lambda what: None)


def test_passes_take_turns_and_each_has_its_own_seconds(single: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []

    def taking(seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(seconds)
            now[0] += seconds

        return run

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    assert bench()._in_turn("passes", [taking(0.25), taking(2.0)]) == [0.25, 2.0]
    assert order == [0.25, 2.0] * (len(order) // 2)


def test_the_first_call_does_not_say_how_often_passes_take_turns_and_none_finds_work_in_the_queue(
    single: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, queued, calls = [0.0], [0], [0]

    def once() -> None:
        now[0] += 1.0 if calls[0] == 0 else 2.0**-10  # it allocates, and opens connections
        now[0] += queued[0] > 1  # one before it in its turn, no more
        queued[0] += 1
        calls[0] += 1

    def synchronize() -> None:
        queued[0] = 0
        now[0] += 1.0

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    on_gpu = bench()
    on_gpu.device = torch.device("cuda")
    assert on_gpu._in_turn("passes", [once, once]) == [2.0**-10, 2.0**-10]
    rounds = math.ceil(on_gpu.sizes.block * 2**10)
    assert rounds > 1
    assert calls[0] == 2 * (2 + measure._BLOCKS * rounds)


def test_operations_are_counted_with_views_and_without_what_the_host_reads() -> None:
    x_AB = torch.ones(2, 3)
    assert measure._operations(lambda: (x_AB.t() + 1).sum().item()) == 3


def delayed(seconds: list[float]) -> float:
    """The cycles for which this process keeps its GPU waiting, if it takes so long to launch a call."""
    cycles: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "Event", Mock(return_value=Mock(elapsed_time=lambda end: 1.0)))
        patch.setattr(measure, "delay_gpu", cycles.append)
        bench()._on_gpu(lambda: time.sleep(seconds[dist.get_rank()]), 2)
    return cycles[0] / measure._CYCLES


def test_no_process_is_kept_waiting_longer_than_others_before_they_communicate(pool: WorkerPool) -> None:
    one, other = pool.run(2, delayed, [0.0, 0.05])
    assert one == pytest.approx(other, rel=1e-6)
    assert one > 2 * 0.05


def launching(asked: bool) -> float:
    with pytest.MonkeyPatch.context() as patch:
        if asked:  # as on GPUs
            patch.setattr(Bench, "_launches", True)
        return bench()._launching()


def test_all_processes_find_the_same_time_to_launch_a_collective_and_a_cpu_none(pool: WorkerPool) -> None:
    one, other = pool.run(2, launching, True)
    assert 0 < one == other < 1
    assert pool.run(2, launching, False) == [0, 0]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (CalibrateConfig("x.json"), r"out=x\.json is not a path that ends in \.yaml"),
        (CalibrateConfig("/dev/null/x.yaml"), "out=/dev/null/x.yaml cannot be written: /dev/null is not a folder"),
        (CalibrateConfig("x.yaml", device="tpu"), "device=tpu is unknown; valid: cpu, cuda"),
        (CalibrateConfig("x.yaml", 1_000_000_000, "cpu"), "processes is 1000000000; it must be at least 1 and at most"),
        (CalibrateConfig("x.yaml", 99, "cuda"), "processes=99, but torch sees"),
    ],
)
def test_a_mistake_is_named_with_what_would_do(config: CalibrateConfig, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        checked(config)


def test_without_a_gpu_the_device_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checked(CalibrateConfig("a/b.yaml", 2)) == CalibrateConfig("a/b.yaml", 2, "cpu")
