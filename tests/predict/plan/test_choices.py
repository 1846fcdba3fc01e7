"""What each way to deal with a routing would cost: what is dropped by hand, times by their own closed forms."""

import json
from pathlib import Path

import numpy as np
import pytest

from tedlab.config import with_values
from tedlab.predict.cluster import load_cluster
from tedlab.predict.estimate import estimate
from tedlab.predict.plan.choices import Choice, choices, show_choices, verdict
from tedlab.predict.sim.routing import SimulatedRouting
from tedlab.predict.spread import Spread
from tedlab.validate import complete_simulated
from tests.certify.runs import composed

H100 = load_cluster("dgx_h100")
JOB = [
    "trainer=gpu",
    "trainer.precision=bf16-true",
    "parallel.world_size=16",
    "parallel.tensor=1",
    "moe.num_experts=16",
]
JOB += ["parallel.expert=16", "model.layers=2", "moe.every=1", "model.hidden=2048", "model.heads=16", "model.ffn=8192"]
JOB += ["model.sequence_length=2048", "data.batch_size=64", "data.micro_batch_size=4", "moe.dispatch=dropless"]
SHARES = np.tile([15.0] + [1.0] * 15, (2, 1))  # half of all choices are of one expert


@pytest.fixture(scope="module")
def found() -> dict[str, Choice]:
    job = complete_simulated(composed(*JOB), H100)
    return {choice.name: choice for choice in choices(job, H100, SHARES)}


def test_what_is_dropped_is_what_one_experts_capacity_leaves(found: dict[str, Choice]) -> None:
    """It is chosen for a half, and takes 1.25 / 16; the other fifteen are chosen for 1 / 30 each, below that."""
    for name in ("capacity 1.25", "capacity 1.25, packed"):
        assert found[name].dropped == pytest.approx(1 / 2 - 1.25 / 16, abs=1e-3)
    assert all(not choice.dropped for name, choice in found.items() if name.startswith("dropless"))


def test_times_are_those_of_each_configurations_own_closed_form(found: dict[str, Choice]) -> None:
    job = complete_simulated(composed(*JOB), H100)
    slots = with_values(job, {"moe.dispatch": "capacity", "moe.capacity_factor": 1.25})
    assert found["capacity 1.25"].step_seconds == estimate(slots, H100).step_seconds
    balanced = found["dropless, balanced by biases"].step_seconds
    assert balanced == pytest.approx(estimate(job, H100).step_seconds)
    hot = estimate(job, H100, 0, SimulatedRouting(job, SHARES).rows(0)).step_seconds  # the first rank has that expert
    assert found["dropless"].step_seconds == pytest.approx(hot)
    assert balanced < found["dropless, LLEP"].step_seconds < hot


def test_a_way_that_is_not_possible_says_why(found: dict[str, Choice]) -> None:
    assert found["dropless, dedup by rank"].step_seconds is None  # a token goes to one expert
    assert "comm.dedup" in found["dropless, dedup by rank"].why_not


def test_the_choices_are_printed_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = complete_simulated(composed(*JOB, f"output_dir={tmp_path}", "moe.top_k=2"), H100)
    show_choices(job, H100, SimulatedRouting(job, SHARES))
    saved = json.loads((tmp_path / "choices.json").read_text())
    printed = capsys.readouterr().out
    assert len(saved) == 9
    assert all(choice["name"] in printed for choice in saved)
    by_name = {choice["name"]: choice for choice in saved}
    assert by_name["dropless, dedup by node"]["between_nodes_bytes"] < by_name["dropless"]["between_nodes_bytes"]


def test_the_verdict_names_what_cannot_be_told_apart_and_neither_what_drops_nor_what_does_not_fit() -> None:
    ways = [
        Choice("drops", {}, 1.0, 1, 0.1),
        Choice("too large", {}, 1.0, 10**12),
        Choice("balanced", {}, 1.0, 1, assumed=True),  # is no setting
        Choice("fastest", {}, 2.0, 1),
        Choice("alike", {}, 2.2, 1),
        Choice("slow", {}, 3.0, 1),
        Choice("other", {}, why_not="it cannot"),
    ]
    assert verdict(ways, H100, Spread(1.2, "")) == (
        "The fastest that fits and drops nothing: fastest. Not told apart from it (1.20 ×): alike.\n"
        "If training reaches it, balanced: 1 s (0.833 to 1.2).\n"
        "Not possible: other: it cannot"
    )


def test_where_nothing_can_be_estimated_it_says_so() -> None:
    assert verdict([Choice("one", {}, why_not="it cannot")], H100, Spread(1.2, "")) == (
        "No way can be estimated.\nNot possible: one: it cannot"
    )
    assert verdict([Choice("large", {}, 1.0, 10**12)], H100, Spread(1.2, "")) == "No way fits that drops nothing."
