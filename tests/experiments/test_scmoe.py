"""What the README of the study of ScMoE says is what its commands gave."""

import json
from pathlib import Path
from statistics import mean

import pytest

import experiments.scmoe as study

FOLDER = Path(study.__file__).parent
TEXT = (FOLDER / "README.md").read_text()
QUALITY = json.loads((FOLDER / "quality.json").read_text())
PREDICTED = json.loads((FOLDER / "predicted.json").read_text())
HIDING = json.loads((FOLDER / "hiding.json").read_text())["rows"]


@pytest.mark.parametrize("variant", QUALITY)
def test_the_readme_has_the_mean_and_the_range_of_three_seeds(variant: str) -> None:
    losses = QUALITY[variant]["val_loss"]
    assert len(losses) == 3
    assert f"{mean(losses):.3f} ({min(losses):.3f}–{max(losses):.3f})" in TEXT


def test_variants_have_the_same_flops_but_for_coefficients_and_routers() -> None:
    """Products of 64 features in two layers, of which a step counts 2 FLOPs each, three times.

    DGMoE has eight of them more, since its router reads two tensors; those with shared experts have a coefficient.
    """
    base = QUALITY["top-2"]["flops_per_token"]
    found = {name: its["flops_per_token"] - base for name, its in QUALITY.items()}
    more = {"top-2": 0, "DGMoE": 8}
    assert found == {name: more.get(name, 1) * 2 * 64 * 2 * 3 for name in QUALITY}


@pytest.mark.parametrize("where", PREDICTED["predicted"])
def test_the_readme_has_the_predicted_gains(where: str) -> None:
    found = PREDICTED["predicted"][where]
    gains = (f"{its['over_top2']:.2f}" for name, its in found.items() if name != "top-2")
    model, cluster = where.split(", ", 1)
    assert f"| {model} | {cluster} | {' | '.join(gains)} |" in TEXT


def test_the_readme_has_the_shares_of_exchanges_on_nvlink() -> None:
    of_top2, of_positions = [], []
    for model in ("GPT2-MoE-Medium", "GPT3-MoE-XL"):
        found = PREDICTED["predicted"][f"{model}, 8 × A800, NVLink"]
        shares = {name: f"{100 * its['exchange_s'] / its['step_s']:.1f} %" for name, its in found.items()}
        assert all(found[name]["hidden_s"] == found[name]["exchange_s"] for name in ("pos1", "pos2", "pos3"))
        (of_position,) = {shares[name] for name in ("pos1", "pos2", "pos3")}
        of_top2.append(f"{shares['top-2']} of the step of top-2" if not of_top2 else shares["top-2"])
        of_positions.append(of_position)
    text = " ".join(TEXT.split())
    assert f"With NVLink exchanges are {of_top2[0]} in GPT2-MoE-Medium and {of_top2[1]} in GPT3-MoE-XL." in text
    assert f"takes as long as {of_positions[0]} and {of_positions[1]} of their steps" in text


def test_the_readme_has_what_hides_and_where_that_is_not_as_predicted() -> None:
    assert len(HIDING) == 9
    missed = []
    for row in HIDING:
        where = f"{1e3 * row['exchange_s']:.0f}"
        shares = " | ".join(f"{row[name]:.0%}" for name in ("predicted", "waited", "gained"))
        assert f"| {row['position']} | {where} | {shares} | {{:.0%}} to {{:.0%}} |".format(*row["spread"]) in TEXT
        points = 100 * (row["gained"] - row["predicted"])
        if abs(points) >= 10:
            missed.append(f"{row['position']} at {where} ms by {points:+.0f}".replace("-", "\N{MINUS SIGN}"))
    said = f"within ten points of the prediction in {9 - len(missed)} of 9 rows"
    assert said + (f" (not in: {', '.join(missed)})" if missed else ".") in " ".join(TEXT.split())
