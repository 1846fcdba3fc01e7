"""What the README of the study of lending says is what the study gave, and the planner gives it again."""

import json
from pathlib import Path

import numpy as np
import pytest

import experiments.llep.__main__ as study
from tedlab.models import GPTSpec
from tedlab.moe import MoESpec

FOLDER = Path(study.__file__).parent
RESULTS = json.loads((FOLDER / "results.json").read_text())


@pytest.mark.parametrize("shape", study.SHAPES)
def test_the_readme_has_each_prediction_beside_what_was_reported(shape: str) -> None:
    text = (FOLDER / "README.md").read_text()
    for hot in study.HOT:
        for row, reported in zip(RESULTS["predicted"][shape][f"{hot} hot"], study.REPORTED[shape], strict=True):
            with_theirs = row.get("speedup_of_their_host")
            kept = [row[f"{way}/kept_bytes"] / 2**30 for way in ("home", "lent")]
            assert (
                f"| {shape} | {hot} | {row['share']:.0%} | {row['home/load']:.2f} → {row['lent/load']:.2f} | "
                f"{row['speedup']:.2f} | {f'{with_theirs:.2f}' if hot == 1 else ''} | "
                f"{f'{reported:.2f}' if hot == 1 else ''} | {kept[0]:.2f} → {kept[1]:.2f} |"
            ) in text
    assert f"{1e3 * RESULTS['planning_seconds'][shape]:.1f} ms" in text


def test_layers_are_those_of_the_paper() -> None:
    """Hidden size, width of an expert, experts, choices, tokens of a GPU (arXiv 2601.17111)."""
    shapes = {}
    for shape in study.SHAPES:
        config = study.job(shape, study.PAPER)
        layer = GPTSpec(config.model, config.moe).blocks[0].feed_forward
        assert isinstance(layer, MoESpec)
        sizes = layer.hidden, layer.expert.ffn, config.moe.num_experts, config.moe.top_k
        shapes[shape] = *sizes, config.model.sequence_length
    assert shapes == {
        "gpt-oss-120b": (2880, 2880, 128, 4, 32768),
        "DeepSeek-V3": (7168, 2048, 256, 8, 16384),
        "Kimi-K2": (7168, 2048, 384, 8, 16384),
    }


def test_forced_choices_are_in_the_shares_of_the_paper() -> None:
    counts_E = study.forced(128, 32768 * 4, 1, 0.95)
    assert counts_E.sum() == 32768 * 4
    assert counts_E[0] / counts_E.sum() == pytest.approx(0.95, abs=1e-3)
    # The load of the busiest of eight GPUs, which bounds the speedup: 8 · (0.95 + 0.05 · 15/127).
    assert RESULTS["predicted"]["gpt-oss-120b"]["1 hot"][3]["home/load"] == pytest.approx(7.647, abs=1e-2)
    assert np.flatnonzero(study.forced(128, 1000, 4, 0.8) > 100).tolist() == [0, 16, 32, 48]


def test_what_the_readme_concludes_is_in_the_numbers() -> None:
    for shape, reported in study.REPORTED.items():
        rows = RESULTS["predicted"][shape]["1 hot"]
        assert all(row["speedup"] <= row["home/load"] / row["lent/load"] * 1.001 for row in rows)
        assert all(row["lent/kept_bytes"] < row["home/kept_bytes"] for row in rows)
        assert all(row["lent/loans"] == 7 for row in rows)
        assert [row["speedup"] for row in rows] == sorted(row["speedup"] for row in rows), reported
    text = " ".join((FOLDER / "README.md").read_text().split())
    above = {
        shape: [100 * (row["speedup"] / its - 1) for row, its in zip(rows["1 hot"], study.REPORTED[shape], strict=True)]
        for shape, rows in RESULTS["predicted"].items()
    }
    gpt, deepseek, kimi = (f"{min(of_shape):.0f} to {max(of_shape):.0f}" for of_shape in above.values())
    assert f"For gpt-oss-120b the predictions are {gpt} % above what is reported, for DeepSeek-V3 {deepseek} %" in text
    assert f"for Kimi-K2 {kimi} %" in text
    off = [
        row["speedup_of_their_host"] / reported - 1
        for shape, of_shape in study.REPORTED.items()
        for row, reported in zip(RESULTS["predicted"][shape]["1 hot"], of_shape, strict=True)
    ]
    assert sum(abs(error) < 0.15 for error in off) == 11
    real = RESULTS["measured"]
    assert 1 < real["speedup"] < real["bound"]
    for row in ("busy_seconds", "seconds"):
        assert f"| {real[f'home/{row}']:.2f} s | {real[f'lent/{row}']:.2f} s |" in text
    assert f"{real['speedup']:.2f} times" in text
