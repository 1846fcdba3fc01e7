"""What ``benchmarks.train_step`` says of a profile."""

from benchmarks.train_step import idle


def test_a_device_is_idle_where_no_kernel_runs_and_beside_a_longer_one_it_is_not() -> None:
    spans = [(0.0, 1000.0, "exchange"), (100.0, 200.0, "product"), (1500.0, 1600.0, "sum"), (1900.0, 2000.0, "sum")]
    assert idle(spans, 1) == ["     0.80 ms idle", "     0.50 ms      1 × exchange → sum"]
    assert idle([], 5) == ["     0.00 ms idle"]
