"""Predicted against measured: the report has both, of the same step, and a wrong prediction shows in it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks import truth
from tedlab.predict.cluster import Dispatch, load_cluster
from tests.pool import WorkerPool

SMALL = ["model.layers=2", "model.hidden=32", "model.heads=2", "model.ffn=64", "model.sequence_length=16"]
SMALL += ["model.vocab_size=64", "moe.num_experts=4", "model.recompute.granularity=block", "parallel=tp2"]
SMALL += ["data.batch_size=4", "data.micro_batch_size=2"]
STEPS = 3


def measured() -> truth.Measured:
    result: truth.Measured = truth.measure(truth.Job({"tiny": truth.composed(SMALL)}, 1, STEPS, "."))["tiny"]
    _join_the_pool_again()
    return result


def compared(result: truth.Measured | str, dispatch: float) -> dict[str, Any]:
    dist.destroy_process_group()
    machine = load_cluster("this_machine")
    slower = replace(machine.kernels, dispatch=Dispatch(dispatch, dispatch, dispatch), asynchronous=False)
    row = truth._compared(truth.composed(SMALL), result, replace(machine, kernels=slower))
    _join_the_pool_again()
    return row


def _join_the_pool_again() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.fixture(scope="module")
def tiny(pool: WorkerPool) -> truth.Measured:
    return pool.run(2, measured)[0]


Compare = Callable[[truth.Measured | str, float], dict[str, Any]]


@pytest.fixture
def compare(pool: WorkerPool) -> Compare:
    return lambda result, dispatch: pool.run(1, compared, result, dispatch)[0]


def test_a_step_is_measured_in_parts_that_add_up(tiny: truth.Measured, compare: Compare) -> None:
    row = compare(tiny, 1e-5)
    assert len(row["measured_steps_s"]) == STEPS - 1  # the first is not timed
    assert all(seconds > 0 for step in tiny.steps for seconds in step.values())
    assert row["measured_steps_s"] == pytest.approx([sum(step.values()) for step in tiny.steps])
    assert row["ratio"] == row["predicted_s"] / row["measured_s"]
    assert sum(row["predicted_s_by_part"].values()) == pytest.approx(row["predicted_s"])
    assert 0 < row["measured_collectives_s"] < row["measured_s"]
    assert row["measured_collectives_s_by_cause"].keys() == row["predicted_collectives_s_by_cause"].keys()
    assert row["equal_bytes"]


@pytest.mark.slow
def test_a_machine_that_is_taken_for_a_slower_one_shows(tiny: truth.Measured, compare: Compare) -> None:
    assert compare(tiny, 1.0)["ratio"] > 1000 * compare(tiny, 1e-5)["ratio"]


@pytest.mark.parametrize("wrong", [{"sent": 1.0}, {"differences": 4}], ids=str)
def test_a_byte_too_many_shows(
    tiny: truth.Measured, compare: Compare, wrong: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = truth.Report(tmp_path / "truth.json", "cpu")
    report.add(kind="step time", name="tiny", processes=2, **compare(replace(tiny, **wrong), 1e-5))
    report.show()
    assert "DIFFERENT" in capsys.readouterr().out


def test_what_failed_is_reported_with_its_error(
    compare: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = truth.Report(tmp_path / "truth.json", "cpu")
    report.attempt(lambda: compare("Traceback …\nRuntimeError: out of memory", 0.0), kind="step time", name="large")
    report.attempt(lambda: {}["no such figure"], kind="memory", name="larger")
    report.show()
    said = capsys.readouterr().out
    assert "large: RuntimeError: out of memory" in said
    assert "larger: KeyError: 'no such figure'" in said
    assert (tmp_path / "truth.json").read_text().count('"error"') == 2


@pytest.mark.slow
def test_peak_memory_is_the_allocators_and_the_simulations(pool: WorkerPool) -> None:
    real, simulated = pool.run(1, peaks)[0]
    assert simulated == pytest.approx(real, rel=0.05)


def peaks() -> tuple[int, int]:
    dist.destroy_process_group()
    config = truth.composed([*SMALL, "model.hidden=128", "model.sequence_length=128"])
    real = truth.allocated(config, "cpu")
    config = truth.composed([*SMALL, "model.hidden=128", "model.sequence_length=128"])
    simulated = sum(truth.simulate(config, load_cluster("dgx_h100")).memory.at_peak().values())
    _join_the_pool_again()
    return real, simulated
