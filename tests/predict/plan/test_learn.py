"""Measured steps correct a cluster's constants, which is known here because the runs are made up of predicted parts."""

import json
from pathlib import Path

import numpy as np
import pytest

from tedlab.commands.plan import prepared
from tedlab.errors import UsageError
from tedlab.predict.cluster import Slower, load_cluster
from tedlab.predict.estimate import Estimate, estimate
from tedlab.predict.estimate.step import COMPUTE, OPTIMIZER
from tedlab.predict.plan.learn import factors_of, learn, left_out
from tedlab.predict.spread import PUBLISHED
from tedlab.report import resolved_yaml
from tedlab.validate import complete_simulated
from tests.certify.runs import composed

A100 = load_cluster("dgx_a100")
LAYOUTS = {
    "dense": ["parallel.world_size=8", "parallel.tensor=1", "parallel.expert=1", "trainer=gpu"],
    "tensor": ["parallel.world_size=16", "parallel.tensor=8", "parallel.expert=1", "trainer=gpu"],
    "expert": ["parallel.world_size=16", "parallel.tensor=1", "parallel.expert=16", "trainer=gpu"],
}
SIZES = ["model.layers=4", "model.hidden=512", "model.heads=8", "model.ffn=2048", "moe.num_experts=16"]
SIZES += ["data.batch_size=128", "trainer.precision=bf16-true"]


def made_up(folder: Path, name: str, kernels: float, collectives: float, **summary: object) -> Estimate:
    """Writes a run whose kernels and collectives took so many times what is predicted."""
    directory = folder / name
    directory.mkdir()
    config = complete_simulated(composed(*SIZES, *LAYOUTS[name]))
    found = estimate(config, A100)
    computing = found.seconds[COMPUTE] + found.seconds[OPTIMIZER]
    taken = kernels * computing + collectives * (found.step_seconds - computing)
    (directory / "config.yaml").write_text(resolved_yaml(config))
    (directory / "summary.json").write_text(json.dumps({"steps": 9, "perf/step_time_s": taken, **summary}))
    return found


def test_kernels_and_collectives_are_corrected_apart_by_runs_that_differ(tmp_path: Path) -> None:
    for name in LAYOUTS:
        made_up(tmp_path, name, 1.25, 0.8, device="NVIDIA A100-SXM4-80GB")
    learned = learn(A100, [str(tmp_path)])
    assert learned.cluster.slower.kernels == pytest.approx(1.25)
    assert learned.cluster.slower.collectives == pytest.approx(0.8)
    assert learned.notes == []
    assert learned.cluster.spread == pytest.approx(1)  # of three runs, each is met
    for run in learned.seen:
        assert run.corrected == pytest.approx(run.measured)
        config = complete_simulated(composed(*SIZES, *LAYOUTS[run.name]))
        assert estimate(config, learned.cluster).step_seconds == pytest.approx(run.measured)
    assert "Predictions were" in learned.verdict()
    assert "{kernels: 1.25, collectives: 0.8}" in learned.verdict()
    assert learned.table().row_count == 3


def test_one_run_gives_both_the_same_factor_and_no_range(tmp_path: Path) -> None:
    found = made_up(tmp_path, "expert", 2.0, 2.0)
    learned = learn(A100, [str(tmp_path / "expert")])
    assert learned.cluster.slower == Slower(pytest.approx(2), pytest.approx(2))
    assert learned.cluster.spread is None
    assert learned.seen[0].predicted == pytest.approx(found.step_seconds)
    assert "Predictions were 0.50 × what 1 run took" in learned.verdict()
    again = learn(learned.cluster, [str(tmp_path / "expert")])  # nothing is left to correct
    assert again.cluster.slower == Slower(pytest.approx(2), pytest.approx(2))


def test_runs_that_say_nothing_are_named(tmp_path: Path) -> None:
    made_up(tmp_path, "dense", 1.0, 1.0, device="NVIDIA H200")
    made_up(tmp_path, "tensor", 1.0, 1.0, **{"comm/link/in_node/emulated_seconds": 1.0})
    made_up(tmp_path, "expert", 1.0, 1.0, **{"perf/step_time_s": None})
    notes = " ".join(learn(A100, [str(tmp_path)]).notes)
    assert f"{tmp_path / 'tensor'} is left out: its times are those of" in notes
    assert f"{tmp_path / 'expert'} is left out: it was too short to measure a step" in notes
    assert "dense was measured on another device (NVIDIA H200) than the cluster's (NVIDIA A100)" in notes
    with pytest.raises(UsageError, match=r"plan\.from has no run whose steps were measured"):
        learn(A100, [str(tmp_path / "tensor")])
    with pytest.raises(UsageError, match="There is no folder"):
        learn(A100, [str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("parts", "measured", "factors"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [2.0, 3.0], [2.0, 3.0]),
        ([[1.0, 1.0], [2.0, 2.0]], [3.0, 6.0], [1.5, 1.5]),  # alike: one factor
        ([[1.0, 0.0], [2.0, 0.0]], [2.0, 4.0], [2.0, 2.0]),  # nothing communicates
        ([[4.0, 1.0], [1.0, 4.0]], [1.0, 19.0], None),  # a negative factor would fit best
    ],
)
def test_factors_worked_by_hand(parts: list[list[float]], measured: list[float], factors: list[float] | None) -> None:
    found = factors_of(np.array(parts), np.array(measured))
    if factors is None:
        factors = [float(np.sqrt(1 / 5 * 19 / 5))] * 2  # the geometric mean of what each run asks for
    assert found == pytest.approx(factors)


def test_the_range_is_how_far_each_run_is_from_what_the_others_teach() -> None:
    """Runs without collectives, all predicted to take 1 s: 2, 2 and 4 s were measured."""
    parts, measured = np.array([[1.0, 0.0]] * 3), np.array([2.0, 2.0, 4.0])
    root = 2 * 2**0.5  # the geometric mean of 2 and 4
    assert left_out(parts, measured) == pytest.approx([root / 2, root / 2, 2 / 4])


def test_from_is_short_for_a_field_that_python_cannot_name() -> None:
    assert prepared(["plan.from=[runs/a,runs/b]", "seed=1"]) == ["plan.runs=[runs/a,runs/b]", "seed=1"]
    assert PUBLISHED.factor > 1
