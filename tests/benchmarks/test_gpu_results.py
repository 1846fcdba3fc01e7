"""What documents say of tests on GPUs is what the machine gave."""

import json
from pathlib import Path
from typing import Any

from tests.test_gpu import CELLS

ROOT = Path(__file__).parents[2]


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}_h200.json").read_text())
    return found


def words(document: str) -> str:
    return " ".join((ROOT / document).read_text().split())


def test_docs_have_the_largest_errors_of_certificates_over_nccl() -> None:
    found = result("test_gpu_x2")
    rows = found["certificates"]
    cells = [((row["processes"], row["tensor"], row["expert"]), row["job"], row["precision"]) for row in rows]
    assert cells == [cell for cell in CELLS if cell[0][0] == found["gpus"]]
    worst = {
        precision: max(row["largest_error"] for row in rows if row["precision"] == precision)
        for precision in ("64-true", "bf16-true")
    }
    said = f"errors of at most {worst['64-true']:.1e} in float64 and {worst['bf16-true']:.2g} of the norm in bf16"
    assert said in words("docs/certify.md")


def test_docs_have_what_a_gpu_generated() -> None:
    rows = {row["batch"]: row for row in result("generation")["results"]["olmoe"]}
    text = words("docs/generate.md")
    for batch, row in rows.items():
        theirs, ours = row["transformers"], row["tedlab"]
        speeds = f"{theirs['tokens_per_second']:,.0f} | {ours['tokens_per_second']:,.0f} | {row['ratio']:.2f}"
        firsts = f"{1e3 * theirs['first_s']:.0f} | {1e3 * ours['first_s']:.0f}"
        assert f"| {batch} | {row['experts']} | {speeds} | {firsts} |" in text
    ratios = (
        f"generated {rows[32]['ratio']:.2f} times as many tokens per second for 32 texts and {rows[1]['ratio']:.2f}"
    )
    assert ratios in words("benchmarks/README.md")
    assert min(row["ratio"] for row in rows.values()) > 1.5


def test_docs_have_what_steps_of_optimizers_took() -> None:
    rows = {row["name"]: row for row in result("muon")["rows"]}
    text, fused, mib = words("docs/muon.md"), rows["AdamW, fused"]["milliseconds"], 2**20
    for row in rows.values():
        times = f"| {row['milliseconds']:,.1f} | {row['milliseconds'] / fused:.1f} |"
        assert f"{times} {row['state_bytes'] / mib:,.0f} MiB | {row['temporary_bytes'] / mib:,.1f} MiB |" in text
    assert f"but {rows['Muon']['milliseconds'] / fused:.0f} times the fused step" in text
    narrow = rows["AdamW, bf16 moments"]
    said = f"took {narrow['milliseconds']:.0f} ms in tiles, {narrow['of_adamw']:.1f} times AdamW's in tiles and"
    assert f"{said} {narrow['milliseconds'] / fused:.0f} times the fused step" in words("docs/training.md")


def test_docs_have_what_masked_documents_took() -> None:
    masked, packed, compiled = (
        1e3 * result(f"documents_{name}")["rows"][0]["step_s"] for name in ("masked", "packed", "packed_compiled")
    )
    text, errors = words("docs/data.md"), result("test_gpu_documents")["flex_attention"]
    assert f"take {masked:.0f} ms a step masked and {packed:.0f} packed, but {compiled:.0f} packed and compiled" in text
    assert f"within {errors['bfloat16']:.1%}".replace("%", " %") in text
    assert f"within {errors['float32']:.1e}".replace("e-0", "e-") in text
