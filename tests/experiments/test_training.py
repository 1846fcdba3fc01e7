"""What the READMEs of studies that train say is what their runs gave."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import pytest

import experiments.masking.__main__ as masking
import experiments.muon.__main__ as muon
from experiments.sweeps import SEEDS, spread


def of(study: object) -> tuple[str, dict[str, dict[str, Sequence[float]]]]:
    folder = Path(str(study.__file__)).parent  # type: ignore[attr-defined]
    return (folder / "README.md").read_text(), json.loads((folder / "results.json").read_text())


def test_a_spread_is_a_mean_with_its_range() -> None:
    assert spread([1.0, 2.0, 4.5]) == "2.500 (1.000–4.500)"


@pytest.mark.parametrize("seen", masking.DOCUMENTS)
@pytest.mark.parametrize("packing", masking.PACKINGS)
def test_the_readme_of_masks_has_the_means_of_three_seeds(seen: str, packing: str) -> None:
    text, results = of(masking)
    losses = results[f"{seen}, {packing}"]["loss"]
    assert len(losses) == len(SEEDS)
    assert f"| {seen} | {packing} | {spread(losses)} |" in text


def test_masks_help_and_whole_documents_hardly_do() -> None:
    text, results = of(masking)
    packed, masked = ([results[f"{seen}, {each}"]["loss"] for each in masking.PACKINGS] for seen in masking.DOCUMENTS)
    assert max(map(max, masked)) < min(map(min, packed))
    concatenated, whole = packed
    assert max(whole) < min(concatenated)
    assert abs(mean(masked[0]) - mean(masked[1])) < 0.003
    assert f"{results['documents']:,} docstrings" in text


@pytest.mark.parametrize("rate", muon.RATES)
def test_the_readme_of_muon_has_the_means_of_three_seeds(rate: str) -> None:
    text, results = of(muon)
    losses = [results[optimizer][rate]["val/loss"] for optimizer in muon.OPTIMIZERS]
    assert [len(each) for each in losses] == [len(SEEDS)] * 2
    assert f"| {rate} | {spread(losses[0])} | {spread(losses[1])} |" in text


def test_what_is_concluded_of_muon_is_in_the_numbers() -> None:
    _, results = of(muon)
    adamw, own = ({rate: results[optimizer][rate]["val/loss"] for rate in muon.RATES} for optimizer in muon.OPTIMIZERS)
    best = {name: min(muon.RATES, key=lambda rate: mean(of_it[rate])) for name, of_it in (("a", adamw), ("m", own))}
    assert best == {"a": "8e-3", "m": "32e-3"}
    assert f"{mean(adamw['8e-3']) - mean(own['32e-3']):.2f}" == "0.15"
    assert round(max(max(losses) - min(losses) for losses in (adamw["8e-3"], own["32e-3"])), 2) == 0.03
    assert min(own["16e-3"]) < max(own["32e-3"])  # their ranges overlap
    assert min(own["32e-3"]) < max(own["16e-3"])
    assert abs(mean(adamw["4e-3"]) - mean(own["4e-3"])) < 0.02
