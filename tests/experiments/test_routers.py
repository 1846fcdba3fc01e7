"""What the README of the study of routers says is what its runs gave."""

import itertools
import json
from pathlib import Path
from statistics import mean

import pytest

import experiments.routers.__main__ as study

FOLDER = Path(study.__file__).parent
RESULTS = json.loads((FOLDER / "results.json").read_text())


@pytest.mark.parametrize("router", study.ROUTERS)
def test_the_readme_has_the_means_and_ranges_of_three_seeds(router: str) -> None:
    text, values = (FOLDER / "README.md").read_text(), RESULTS[router]
    for name in ("val/loss", "router/load_cv"):
        found = values[name]
        assert len(found) == len(study.SEEDS)
        assert f"{mean(found):.3f} ({min(found):.3f}–{max(found):.3f})" in text
    dropped = values["router/dropped_fraction"]
    assert f"{100 * mean(dropped):.1f} % ({100 * min(dropped):.1f}–{100 * max(dropped):.1f})" in text


def test_what_the_readme_concludes_is_in_the_numbers() -> None:
    losses = {router: RESULTS[router]["val/loss"] for router in study.ROUTERS}
    balanced = ("first_choices", "micro_batch", "sequence", "global_batch", "biases")
    pairs = itertools.combinations(balanced, 2)
    apart = {
        pair: max(min(losses[router]) for router in pair) - min(max(losses[router]) for router in pair)
        for pair in pairs
    }
    assert {pair for pair, distance in apart.items() if distance > 0} == {("first_choices", "sequence")}
    assert f"{apart['first_choices', 'sequence']:.3f}" == "0.002"
    assert max(losses["hash"]) < min(min(found) for router, found in losses.items() if router != "hash")
    assert min(RESULTS["none"]["router/dropped_fraction"]) > 0.3
    assert all(max(RESULTS[router]["router/dropped_fraction"]) < 0.04 for router in balanced)
    assert all(0.002 < RESULTS[router]["flips"] < 0.0045 for router in ("none", *balanced))
