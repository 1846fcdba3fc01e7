"""What the README of the study of overlap says is what its command gave."""

import json
from pathlib import Path

import experiments.overlap as study
from experiments.overlap.__main__ import Row

FOLDER = Path(study.__file__).parent
TEXT = (FOLDER / "README.md").read_text()
ROWS = json.loads((FOLDER / "results.json").read_text())["rows"]


def test_the_readme_has_every_row() -> None:
    for row in ROWS:
        first, third = Row(**row).spread
        shares = f"{row['share']:.0%} | {1e3 * row['step_s']:.0f} | {row['predicted']:.0%} | {row['gained']:.0%}"
        assert f"| `{row['toggle']}` | {shares} | {first:.0%} to {third:.0%} |" in TEXT


def test_the_readme_says_how_many_are_as_predicted() -> None:
    close = [row for row in ROWS if abs(row["gained"] - row["predicted"]) <= 0.1]
    assert f"within ten points in {len(close)} of {len(ROWS)} rows" in " ".join(TEXT.split())
