"""What the README of the study of X-MoE and parallel folding says is what was predicted, and is predicted again."""

import json
from pathlib import Path
from typing import Any

import pytest

import experiments.xmoe.__main__ as study
from tedlab.degrees import ParallelDegrees, parallel_degrees

FOLDER = Path(study.__file__).parent
RESULTS: dict[str, Any] = json.loads((FOLDER / "results.json").read_text())
README = (FOLDER / "README.md").read_text()


def test_the_readme_has_each_prediction() -> None:
    for case, systems in RESULTS["frontier"].items():
        for system, found in systems.items():
            assert f"| {case} | {system} | {' | '.join(study.cells(found))} |" in README
    for system, found in RESULTS["as_run"].items():
        factor = found["step_s"] / RESULTS["as_run"]["X-MoE"]["step_s"]
        assert f"| {system} | {' | '.join(study.cells(found))} | {factor:.2f} |" in README
    for name, found in RESULTS["folding"].items():
        reported = study.FOLDING[name].reported
        numbers = f"{found['memory_gib']:.1f} | {found['step_s']:.2f} | {found['mfu_percent']:.1f}"
        assert f"| {name} | {numbers} | {'' if reported is None else reported} |".replace("|  |", "| |") in README
    for name, both in RESULTS["confirmed"].items():
        assert both["closed_form_s"] == pytest.approx(both["simulated_s"], rel=0.01)
        assert both["closed_form_gib"] == pytest.approx(both["simulated_gib"], rel=0.05)
        seconds = f"{both['closed_form_s']:.2f} | {both['simulated_s']:.2f}"
        assert f"| {name} | {seconds} | {both['closed_form_gib']:.1f} | {both['simulated_gib']:.1f} |" in README


@pytest.mark.parametrize("case", ["Medium, 256", "Large, 256"])
def test_predictions_are_those_of_today(case: str) -> None:
    name, world = case.split(", ")
    for system in ("TED", "SSMB, rows", "SSMB, rows, once a node"):
        model = study.MODELS[name]
        again = study.numbers(study.predicted((*model.sizes(), *study.SYSTEMS[system].layout(model, int(world))))[1])
        assert again == pytest.approx(RESULTS["frontier"][case][system], rel=1e-4)


def test_a_folded_row_is_predicted_as_then() -> None:
    name = "G8T8, folded TP8 EP8 ETP1"
    config, result = study.predicted(study.FOLDING[name].overrides(), study.H100)
    assert 100 * result.mfu == pytest.approx(RESULTS["folding"][name]["mfu_percent"], rel=1e-4)
    assert parallel_degrees(config.parallel) == ParallelDegrees(128, 8, 8, True, 1)


@pytest.mark.parametrize("name", study.MODELS)
def test_models_have_as_many_parameters_as_reported(name: str) -> None:
    assert study.parameters(name) == pytest.approx(study.REPORTED["parameters"][name], rel=5e-3)


def test_choices_of_eight_of_256_experts_are_on_as_many_nodes_as_reported() -> None:
    """Redundancy of 75.1 % and 54.8 % on two and four nodes (arXiv 2508.13337)."""
    redundant = [1 - study.distinct(256, 8, nodes) / 8 for nodes in (2, 4)]
    assert redundant == pytest.approx([0.751, 0.548], abs=5e-4)


def test_what_the_readme_concludes_is_in_the_numbers() -> None:
    limit = study.FRONTIER.memory_bytes / study.GIB
    large = RESULTS["frontier"]["Large, 256"]
    assert large["Tutel-like"]["memory_gib"] > limit
    assert large["SSMB, rows"]["memory_gib"] < limit
    for systems in RESULTS["frontier"].values():
        ted, sliced = systems["TED, rows"], systems["SSMB, rows"]
        assert sliced["step_s"] < ted["step_s"]
        assert sliced["in_node_gb"] < ted["in_node_gb"]
        assert sliced["memory_gib"] < ted["memory_gib"]
        own = systems["SSMB, rows, once a node"]
        assert own["memory_gib"] == min(found["memory_gib"] for found in systems.values())
        assert own["between_nodes_gb"] == pytest.approx(systems["rows, once a node"]["between_nodes_gb"], rel=0.01)
