"""Measured steps correct a cluster's constants, which is known here because the runs are made up of predicted parts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tedlab.commands.plan import prepared
from tedlab.errors import UsageError
from tedlab.predict.cluster import Dispatch, Kernels, MeasuredWait, Slower, load_cluster
from tedlab.predict.estimate import Estimate, estimate
from tedlab.predict.estimate.step import COMPUTE, OPTIMIZER
from tedlab.predict.plan.learn import Learned, factors_of, learn, left_out
from tedlab.predict.sim import simulate
from tedlab.predict.spread import PUBLISHED
from tedlab.report import resolved_yaml
from tedlab.validate import complete_simulated
from tests.certify.runs import composed
from tests.pool import WorkerPool
from tests.predict.sim.test_simulation import out_of_the_pools_group

A100 = load_cluster("dgx_a100")
LAYOUTS = {
    "dense": ["parallel.world_size=8", "parallel.tensor=1", "parallel.expert=1", "trainer=gpu"],
    "tensor": ["parallel.world_size=16", "parallel.tensor=8", "parallel.expert=1", "trainer=gpu", "optim=adamw_bf16"],
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
    told: list[float] = []
    learned = learn(A100, [str(tmp_path)], told.append)
    assert len(told) >= 2 * len(LAYOUTS), "each run is predicted before and after it was corrected"
    assert 0 < sum(told) <= 1
    assert learned.cluster.slower.kernels == pytest.approx(1.25)
    assert learned.cluster.slower.collectives == pytest.approx(0.8)
    assert learned.notes == []
    assert learned.spread.source == "how far each of 3 runs is from the others"
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
    assert learned.spread is PUBLISHED
    assert learned.seen[0].predicted == pytest.approx(found.step_seconds)
    assert "Predictions were 0.50 × what 1 run took" in learned.verdict()
    again = learn(learned.cluster, [str(tmp_path / "expert")])  # nothing is left to correct
    assert again.cluster.slower == Slower(pytest.approx(2), pytest.approx(2))


HELD_UP = Kernels(Dispatch(forward=2e-5, backward=1e-5, optimizer=1e-5), asynchronous=False)
SMALLER = {False: ["data.batch_size=2", "data.micro_batch_size=1", "model.layers=1", "moe.every=1"]}
SMALLER[True] = ["data.batch_size=32", "model.layers=2"]  # for the device to keep the host waiting now and then


def learned_by_simulation(folder: Path, kernels: Kernels) -> tuple[Learned, float, float]:
    """Learns from a run whose device is 1.5 × slower than the cluster's; returns the step measured and predicted."""
    cluster = replace(A100, kernels=kernels, waits=[MeasuredWait(8, 1, 1e-5, 0.1)])
    config = complete_simulated(composed(*SIZES, *LAYOUTS["tensor"], *SMALLER[kernels.asynchronous]))
    made_up(folder, "tensor", 1.0, 1.0)
    with out_of_the_pools_group():
        taken = simulate(config, replace(cluster, slower=Slower(1.5, 1.5))).step_seconds
        (folder / "tensor" / "config.yaml").write_text(resolved_yaml(config))
        (folder / "tensor" / "summary.json").write_text(json.dumps({"steps": 9, "perf/step_time_s": taken}))
        learned = learn(cluster, [str(folder)])
        return learned, taken, simulate(config, learned.cluster).step_seconds


@pytest.mark.parametrize(
    "kernels",
    [
        pytest.param(HELD_UP, id="CPU"),
        pytest.param(replace(HELD_UP, asynchronous=True), id="GPU", marks=pytest.mark.slow),
    ],
)
def test_the_host_and_waits_count_once(kernels: Kernels, pool: WorkerPool, tmp_path: Path) -> None:
    """What a plan prints of its winner is a simulation, so that is what has to meet the run."""
    learned, taken, after = pool.run(1, learned_by_simulation, tmp_path, kernels)[0]
    assert after == pytest.approx(taken, rel=5e-3 if kernels.asynchronous else 1e-3)
    assert learned.seen[0].corrected == pytest.approx(after)
    assert learned.seen[0].predicted < taken
    if not kernels.asynchronous:
        assert learned.cluster.slower == Slower(pytest.approx(1.5, rel=1e-3), pytest.approx(1.5, rel=1e-3))


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


def test_a_damaged_run_is_left_out_with_the_reason(tmp_path: Path) -> None:
    made_up(tmp_path, "dense", 1.0, 1.0)
    good = yaml.safe_load((tmp_path / "dense" / "config.yaml").read_text())
    times = {"nan": float("nan"), "inf": float("inf"), "below": -1.0, "tiny": 5e-324, "list": [1.0], "false": False}
    configs: dict[str, dict[str, Any]] = {
        "no_trainer": {"trainer": {}},
        "no_degrees": {"parallel": {"world_size": 0, "tensor": None, "expert": None}},
        "no_model": {"model": {**good["model"], "hidden": 0}},
        "no_optimizer": {"optim": {**good["optim"], "optimizer": {}}},
        "no_precision": {"trainer": {**good["trainer"], "precision": "x"}},
    }
    for name, config in ({key: {} for key in times} | configs).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(good | config))
        summary = {"steps": 9, "perf/step_time_s": times.get(name, 1.0)}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    learned = learn(A100, [str(tmp_path)])
    assert [Path(run.name).name for run in learned.seen] == ["dense"]
    for name in (*times, *configs):
        assert sum(note.startswith(f"{tmp_path / name} is left out: ") for note in learned.notes) == 1, learned.notes


def test_a_vocabulary_that_a_run_does_not_tell_is_that_of_a_prediction(tmp_path: Path) -> None:
    made_up(tmp_path, "dense", 1.0, 1.0)
    path = tmp_path / "dense" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(values | {"model": values["model"] | {"vocab_size": None}}))
    assert learn(A100, [str(tmp_path)]).notes == []


def test_what_a_run_says_of_itself_stays_within_a_note(tmp_path: Path) -> None:
    """Notes become comments of the plan's file, of which every other line is an override."""
    made_up(tmp_path, "dense", 1.0, 1.0, device="H200\noptim.lr=9")
    made_up(tmp_path, "expert", 1.0, 1.0, state="failed", reason="why\u2028seed=9")
    notes = learn(A100, [str(tmp_path)]).notes
    assert [len(note.splitlines()) for note in notes] == [1, 1]
    assert f"{tmp_path / 'expert'} is left out: it failed at step 9 (why seed=9)" in notes  # plan has no force=true


def test_a_run_that_comes_from_others_constructs_and_imports_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fired = tmp_path / "fired"
    (tmp_path / "evil_module.py").write_text(f"open({str(fired)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    evil = {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": [str(fired)]}]}
    planted: dict[str, dict[str, Any]] = {
        "target": {"optim": {"optimizer": evil}},
        "option": {"optim": {"optimizer": {"_target_": "torch.optim.AdamW", "betas": [evil]}}},
        "logger": {"logger": {"x": evil}, "callbacks": {"x": {**evil, "_args_": []}}},
        # A stage that changes the size of batches asks which class makes them.
        "module": {"data": {"module": "evil_module.It", "ramp": [{"until": 1, "batch_size": 64}]}},
    }
    for name, values in planted.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        made_up(tmp_path / "runs" / name, "dense", 1.0, 1.0)
        path = tmp_path / "runs" / name / "dense" / "config.yaml"
        config = yaml.safe_load(path.read_text())
        for section, value in values.items():
            config[section] = config.get(section, {}) | value
        path.write_text(yaml.safe_dump(config))
    runs = [str(tmp_path / "runs" / name / "dense") for name in planted]
    learned = learn(A100, runs)
    assert [path for path in runs if any(path in note for note in learned.notes)] == runs[:2]
    assert all("none of torch.optim" in note for note in learned.notes)
    assert not fired.exists()


@pytest.mark.parametrize(
    ("parts", "measured", "factors"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [2.0, 3.0], [2.0, 3.0]),
        ([[1.0, 1.0], [2.0, 2.0]], [3.0, 6.0], [1.5, 1.5]),  # alike: one factor
        ([[0.9, 0.1], [0.88, 0.12]], [1.0, 1.03], [(1.0 * 1.03) ** 0.5] * 2),  # nearly alike: noise tells nothing
        ([[1.0, 0.0], [2.0, 0.0]], [2.0, 4.0], [2.0, 2.0]),  # nothing communicates
        ([[4.0, 1.0], [1.0, 4.0]], [1.0, 19.0], None),  # a negative factor would fit best
    ],
)
def test_factors_worked_by_hand(parts: list[list[float]], measured: list[float], factors: list[float] | None) -> None:
    found = factors_of(np.array(parts), np.array(measured))
    if factors is None:
        factors = [float(np.sqrt(1 / 5 * 19 / 5))] * 2  # the geometric mean of what each run asks for
    assert found == pytest.approx(factors)


def test_what_is_fixed_is_corrected_by_no_factor() -> None:
    parts, measured, fixed = np.eye(2), np.array([3.0, 4.0]), np.array([1.0, 1.0])
    assert factors_of(parts, measured, fixed) == pytest.approx([2.0, 3.0])
    assert factors_of(parts[:1], measured[:1], fixed[:1]) == pytest.approx([2.0, 2.0])
    assert left_out(np.ones((2, 2)), np.array([5.0, 5.0]), np.array([1.0, 1.0])) == pytest.approx([1.0, 1.0])
    assert factors_of(parts[:1], measured[:1], np.array([9.0])) == pytest.approx([1.0, 1.0])  # longer than the run


def test_factors_that_are_far_apart_are_doubtful(tmp_path: Path) -> None:
    for name in LAYOUTS:
        made_up(tmp_path, name, 1.0, 3.0)
    assert ["collectives by 3" in note for note in learn(A100, [str(tmp_path)]).notes] == [True]


def test_the_range_is_how_far_each_run_is_from_what_the_others_teach() -> None:
    """Runs without collectives, all predicted to take 1 s: 2, 2 and 4 s were measured."""
    parts, measured = np.array([[1.0, 0.0]] * 3), np.array([2.0, 2.0, 4.0])
    root = 2 * 2**0.5  # the geometric mean of 2 and 4
    assert left_out(parts, measured) == pytest.approx([root / 2, root / 2, 2 / 4])


def test_from_is_short_for_a_field_that_python_cannot_name() -> None:
    assert prepared(["plan.from=[runs/a,runs/b]", "seed=1"]) == ["plan.runs=[runs/a,runs/b]", "seed=1"]
    assert PUBLISHED.factor > 1


def test_a_plan_for_a_calibration_of_cpus_is_for_cpus_unless_a_trainer_is_given() -> None:
    assert prepared(["cluster=this_machine", "seed=1"]) == ["cluster=this_machine", "seed=1", "trainer=cpu"]
    assert prepared(["cluster=this_machine", "trainer=gpu"]) == ["cluster=this_machine", "trainer=gpu"]
    for clusters in ("dgx_h100", "this_machine,dgx_h100"):
        assert prepared([f"cluster={clusters}"]) == [f"cluster={clusters}"]
