"""What documents say of tests on GPUs is what the machine gave."""

import json
from pathlib import Path

from tests.test_gpu import CELLS

ROOT = Path(__file__).parents[2]


def test_docs_have_the_largest_errors_of_certificates_over_nccl() -> None:
    found = json.loads((ROOT / "benchmarks/results/test_gpu_h200_x2.json").read_text())
    rows = found["certificates"]
    cells = [((row["processes"], row["tensor"], row["expert"]), row["job"], row["precision"]) for row in rows]
    assert cells == [cell for cell in CELLS if cell[0][0] == found["gpus"]]
    worst = {
        precision: max(row["largest_error"] for row in rows if row["precision"] == precision)
        for precision in ("64-true", "bf16-true")
    }
    text = " ".join((ROOT / "docs/certify.md").read_text().split())
    assert (
        f"errors of at most {worst['64-true']:.1e} in float64 and {worst['bf16-true']:.2g} of the norm in bf16" in text
    )
