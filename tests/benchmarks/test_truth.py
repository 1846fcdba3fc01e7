"""Predicted against measured: the report has both, of the same step, and a wrong prediction shows in it."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from benchmarks import truth
from benchmarks.steps import composed
from tedlab.predict.cluster import Dispatch, load_cluster
from tedlab.predict.estimate import estimate
from tests.pool import WorkerPool

SMALL = ["model.layers=2", "model.hidden=32", "model.heads=2", "model.ffn=64", "model.sequence_length=16"]
SMALL += ["model.vocab_size=64", "moe.num_experts=4", "model.recompute.granularity=block", "parallel=tp2"]
SMALL += ["data.batch_size=4", "data.micro_batch_size=2", "comm.ledger.time=true"]
ROUTED = [*SMALL, "parallel=ep2", "moe.dispatch=dropless", "model.recompute.granularity=none"]
ROUTED += ["model.sequence_length=64", "model.ffn=512"]  # so that memory depends on the rows that experts get
STEPS = 3


def measured(path: Path) -> list[dict[str, Any]]:
    report = truth.Report(path)
    if dist.get_rank() == 0:
        report.begin("cpu")
    truth.measure(truth.Job(report, {"tiny": SMALL, "routed": ROUTED}, 2, 1, 1, STEPS))
    _join_the_pool_again()
    return report.rows("step time") if os.environ["RANK"] == "0" else []  # who writes it knows that it is written


def predicted(row: dict[str, Any], dispatch: float) -> dict[str, Any]:
    dist.destroy_process_group()
    machine = load_cluster("this_machine")
    slower = replace(machine.kernels, dispatch=Dispatch(dispatch, dispatch, dispatch), asynchronous=False)
    both = row | truth.prediction(row, replace(machine, kernels=slower))
    _join_the_pool_again()
    return both


def _join_the_pool_again() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.fixture(scope="module")
def rows(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    both: list[dict[str, Any]] = pool.run(2, measured, tmp_path_factory.mktemp("truth") / "truth.json")[0]
    return both


@pytest.fixture
def tiny(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return rows[0]


Predict = Callable[[dict[str, Any], float], dict[str, Any]]


@pytest.fixture
def predict(pool: WorkerPool) -> Predict:
    return lambda row, dispatch: pool.run(1, predicted, row, dispatch)[0]


@pytest.fixture
def report(tmp_path: Path) -> truth.Report:
    made = truth.Report(tmp_path / "truth.json")
    made.begin("cpu")
    return made


def test_a_step_is_measured_in_parts_that_add_up(tiny: dict[str, Any], predict: Predict) -> None:
    row = predict(tiny, 1e-5)
    assert len(row["measured_steps_s"]) == STEPS  # the first, which is not timed, comes before them
    assert all(seconds > 0 for seconds in row["measured_s_by_part"].values())
    assert row["measured_host_s_by_part"] == {part: row["measured_s_by_part"][part] for part in ("forward", "backward")}
    assert row["quickest_s"] <= row["measured_s"] <= max(row["measured_steps_s"])
    assert row["ratio"] == row["predicted_s"] / row["measured_s"]
    assert sum(row["predicted_s_by_part"].values()) == pytest.approx(row["predicted_s"])
    assert 0 < row["measured_collectives_s"] < row["measured_s"]
    assert row["measured_collectives_s_by_cause"].keys() == row["predicted_collectives_s_by_cause"].keys()
    assert row["equal_bytes"]


def test_the_host_has_seconds_of_its_own_beside_those_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = accumulate(cycle([1.0, 2.0, 3.0, 4.0]))  # forward, backward, optimizer, loop

    class Event:
        """Of a GPU that takes 100 times as long as the host."""

        def __init__(self, enable_timing: bool) -> None:
            self.seconds = 0.0

        def record(self) -> None:
            self.seconds = 100 * now[-1]

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.seconds - self.seconds)

    now: list[float] = []

    def perf_counter() -> float:
        now.append(next(ended))
        return now[-1]

    monkeypatch.setattr(truth.time, "perf_counter", perf_counter)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock, trainer, none = truth.Clock(Mock(ledger=Mock(totals={}))), Mock(accumulate_grad_batches=2), Mock()
    for batch in range(6):
        clock.on_train_batch_start(trainer, none, none, batch)
        clock.on_before_backward(trainer, none, none)
        clock.on_after_backward(trainer, none)
        clock.on_train_batch_end(trainer, none, none, none, batch)
    host = {"forward": 4.0, "backward": 6.0, "optimizer": 8.0, "loop": 2.0}  # of two micro-batches
    assert clock.host_seconds() == [host, host]
    assert clock.seconds() == [{part: 100 * taken for part, taken in host.items()}] * 2


@pytest.mark.slow
def test_a_machine_that_is_taken_for_a_slower_one_shows(tiny: dict[str, Any], predict: Predict) -> None:
    assert predict(tiny, 1.0)["ratio"] > 1000 * predict(tiny, 1e-5)["ratio"]


def test_what_routers_chose_is_recorded_and_predicted(rows: list[dict[str, Any]], predict: Predict) -> None:
    capacity, routed = rows
    assert "choices" not in capacity
    assert len(routed["choices"]) == STEPS
    for (chosen,) in routed["choices"]:  # of the one layer with experts
        counts = [int(number) for number in chosen.split()]
        assert len(counts) == 4
        assert sum(counts) == 4 * 64  # tokens of both processes, each with one choice
    mine, theirs = [["1 0 0 0"]], [["0 0 0 1"]]
    first, second, both, sums = (
        predict(routed | {"choices": choices}, 1e-5) for choices in (mine, theirs, mine + theirs, mine[0])
    )
    assert first["predicted_bytes"] > 1.1 * second["predicted_bytes"]  # of the first process
    assert first["predicted_s"] == pytest.approx(second["predicted_s"])  # each waits for who computes all
    assert both["predicted_bytes"] == first["predicted_bytes"]  # of the step with the most rows
    assert both["predicted_s"] < first["predicted_s"]  # of all steps
    assert sums["predicted_bytes"] == first["predicted_bytes"]


@pytest.mark.parametrize("wrong", [{"sent_bytes": 1.0}, {"differences": 4}], ids=str)
def test_a_byte_too_many_shows(
    tiny: dict[str, Any],
    predict: Predict,
    wrong: dict[str, Any],
    report: truth.Report,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report.add(**predict(tiny | wrong, 1e-5))
    report.show()
    assert "DIFFERENT" in capsys.readouterr().out


def test_what_failed_is_reported_with_its_error_and_the_others_go_on(
    report: truth.Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_after_another(job: truth.Job) -> None:
        for name in job.overrides:
            job.report.starts({"kind": job.kind, "name": name, "processes": 2, "overrides": []})
            if name == "large":
                raise RuntimeError("out of memory")
            job.report.add(
                kind=job.kind,
                name=name,
                processes=2,
                **truth.Measured(
                    [dict.fromkeys(truth._PARTS, 1.0)], [{}], host=[{"forward": 1, "backward": 1}]
                ).figures(),
            )

    monkeypatch.setattr(truth, "launch", lambda run, job, processes: one_after_another(job))
    truth.measured(truth.Job(report, {"small": [], "large": [], "last": []}, 2, 1, 1, STEPS))
    truth.predicted(report)  # nothing was calibrated
    report.show()
    rows = report.rows("step time")
    assert [row["name"] for row in rows] == ["small", "large", "last"]
    assert ["error" in row for row in rows] == [False, True, False]
    said = capsys.readouterr().out
    assert "large: RuntimeError: out of memory" in said
    assert "last: KeyError: 2" in said


def test_what_fails_before_any_configuration_is_not_tried_again(
    report: truth.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(run: object, job: object, processes: int) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(truth, "launch", fails)
    truth.measured(truth.Job(report, {"small": []}, 2, 1, 1, STEPS))
    assert [row["name"] for row in report.rows("step time")] == ["all"]


def test_all_configurations_for_gpus_are_valid() -> None:
    for processes, configs in truth.CUDA.items():
        for overrides in configs.values():
            assert composed(overrides).parallel.world_size == processes
    assert len(truth.CUDA[2]) >= 12
    assert len(truth.CUDA[4]) >= 8


@pytest.mark.slow
def test_what_the_file_of_two_gpus_predicts_is_what_the_code_predicts(pool: WorkerPool) -> None:
    """Of one row each of plain, grouped and compiled kernels."""
    rows = truth.Report(truth._RESULTS / "truth_h200_x2.json").rows("step time", "calibration")
    yaml = {row["processes"]: row["yaml"] for row in rows if row["kind"] == "calibration"}
    kept = [row for row in rows if row["name"] in ("… dense, tensor 2", "… tensor 2", "… compiled")]
    assert len(kept) == 3
    again = pool.run(1, predicted_again, [(row, yaml[row["processes"]]) for row in kept])[0]
    for row, prediction in zip(kept, again, strict=True):
        assert prediction["predicted_s"] == pytest.approx(row["predicted_s"], rel=1e-3)
        assert prediction["predicted_bytes"] == row["predicted_bytes"]


def predicted_again(rows: list[tuple[dict[str, Any], list[str]]]) -> list[dict[str, Any]]:
    dist.destroy_process_group()
    try:
        return [truth.prediction(row, truth.calibrated_cluster(yaml)) for row, yaml in rows]
    finally:
        _join_the_pool_again()


@pytest.mark.slow
def test_peak_memory_is_the_allocators_and_the_simulations(pool: WorkerPool) -> None:
    real, simulated = pool.run(1, peaks)[0]
    assert simulated == pytest.approx(real, rel=0.05)


def peaks() -> tuple[int, int]:
    dist.destroy_process_group()
    config = composed([*SMALL, "model.hidden=128", "model.sequence_length=128"])
    real = truth.allocated(config, "cpu")
    config = composed([*SMALL, "model.hidden=128", "model.sequence_length=128"])
    simulated = sum(truth.simulate(config, load_cluster("dgx_h100")).memory.at_peak().values())
    _join_the_pool_again()
    return real, simulated


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("rounds=0", "rounds=0 is not a whole number of at least 1"),
        ("rounds=x", "rounds=x is not a whole number"),
        ("memory=no", "memory=no is neither true nor false"),
        ("again=nowhere.json", "again=nowhere.json: there is no such file"),
        ("processes=1,2x", "processes=1,2x: there are configurations for"),
        ("device=tpu", "device=tpu is unknown; valid: cpu, cuda"),
        ("speed=1", "there is no such argument"),
        ("only=model=gpt", "only=model=gpt: no configuration for processes=2,4,8 has this override"),
    ],
)
def test_an_argument_that_cannot_be_meant_is_a_sentence(given: str, said: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["truth", given])
    with pytest.raises(SystemExit, match=said):
        truth.main()


@pytest.fixture(scope="module")
def four() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((truth._RESULTS / "truth_h200_x4.json").read_text())
    return found


@pytest.mark.slow
def test_layouts_that_were_measured_come_out_in_their_order(four: dict[str, Any]) -> None:
    """By the closed form, as a plan ranks them, in tokens/s. One of eleven is out of order, as docs/truth.md says."""
    calibration, *steps = four["rows"]
    cluster = truth.calibrated_cluster(calibration["yaml"])
    orders: dict[bool, list[list[tuple[float, str]]]] = {False: [[], []], True: [[], []]}
    for row in steps:
        if "skewed" in row["name"]:
            continue  # a plan assumes equal choices
        config = composed(row["overrides"])
        tokens = config.data.batch_size * config.model.sequence_length
        for seconds, order in zip(
            (estimate(config, cluster).step_seconds, row["measured_s"]), orders[config.moe.ragged], strict=True
        ):
            order.append((tokens / seconds, row["name"]))
    names = {ragged: [[name for _, name in sorted(o)] for o in both] for ragged, both in orders.items()}
    assert names[True][0] == names[True][1]
    assert len(names[True][0]) == 5
    fused = "… recomputing, fused reduce-scatter, CAC"
    closed, last = names[False]
    assert [name for name in closed if name != fused] == last[1:]
    assert last[0] == fused


@pytest.mark.slow
def test_where_all_tokens_are_gathered_a_prediction_counts_the_rows_that_are_computed(
    four: dict[str, Any], pool: WorkerPool
) -> None:
    calibration, *steps = four["rows"]
    row = next(row for row in steps if row["name"] == "… all tokens gathered")
    again = pool.run(1, predicted_on, row, calibration["yaml"])[0]
    assert row["ratio"] > 1.3  # on the day, from all of the room
    assert again["ratio"] == pytest.approx(1.0, abs=0.05)


def predicted_on(row: dict[str, Any], lines: list[str]) -> dict[str, Any]:
    dist.destroy_process_group()
    again = truth.prediction(row, truth.calibrated_cluster(lines))
    _join_the_pool_again()
    return again
