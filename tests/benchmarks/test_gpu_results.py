"""What documents say of GPUs, and of generation on a CPU, is what the machine gave."""

import json
from pathlib import Path
from typing import Any

from tests.test_gpu import CELLS

ROOT = Path(__file__).parents[2]


def result(name: str) -> Any:
    return json.loads((ROOT / f"benchmarks/results/{name}_h200.json").read_text())


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


def test_docs_have_what_a_gpu_generated_without_a_comparison() -> None:
    """transformers' figures, measured without its cache, are withdrawn, until a run gives others."""
    found, text = result("generation"), words("docs/generate.md")
    for row in found["results"]["olmoe"]:
        assert row.keys() == {"batch", "tedlab", "texts_alike"}
        ours = row["tedlab"]
        assert f"| {row['batch']} | {ours['tokens_per_second']:,.0f} | {1e3 * ours['first_s']:.0f} |" in text
    assert "withdrawn" in found
    assert "is not shown on a GPU" in text
    assert "withdrawn, because it had no cache" in words("benchmarks/README.md")


def test_docs_have_what_a_cpu_generated() -> None:
    found = json.loads((ROOT / "benchmarks/results/generation_cpu.json").read_text())["results"]
    text = words("docs/generate.md")
    for name, rows in zip(("OLMoE", "Qwen3-MoE"), (found["olmoe"], found["qwen3_30b"]), strict=True):
        for row in rows:
            theirs, ours = row["transformers"], row["tedlab"]
            speeds = f"{theirs['tokens_per_second']:,.0f} | {ours['tokens_per_second']:,.0f} | {row['ratio']:.2f}"
            firsts = f"{1e3 * theirs['first_s']:.0f} | {1e3 * ours['first_s']:.0f}"
            assert f"| {name}, {row['batch']} | {speeds} | {firsts} |" in text
            assert row["experts"] == "grouped_mm"
            assert row["texts_alike"] == 1


def test_docs_compare_passes_and_steps_of_one_call_on_two_gpus() -> None:
    """Of rows and of gathered tokens with the best peer, and whole steps with their MFU and memory."""
    rows = result("expert_parallel_one_call")[0]["rows"]
    said = words("benchmarks/README.md")
    passes, alike, steps, used, gib = [], [], [], [], []
    for case in "AB":
        named = {row["name"]: row for row in rows if row["case"] == case}
        plain, gathered = named["tedlab, expert 2"], named["tedlab, expert 2, comm.dedup=group"]
        best = min((row for row in named.values() if "tedlab" not in row["name"]), key=lambda row: row["passes_s"])
        alike.append(best["passes_s"] / plain["passes_s"])
        passes.append(best["passes_s"] / gathered["passes_s"])
        steps.append((1e3 * gathered["step_s"], 1e3 * best["step_s"], best["step_s"] / gathered["step_s"]))
        used.append((100 * gathered["mfu"], 100 * best["mfu"]))
        gib.append((gathered["peak_gib"], best["peak_gib"]))
    assert f"tedlab is {alike[0]:.2f} times as fast as the best peer on A" in said
    assert f"and {alike[1]:.2f} times on B" in said
    assert f"With gathered tokens it is {passes[0]:.2f} and {passes[1]:.2f} times as fast" in said
    (ours, theirs, ratio), (ours_b, theirs_b, ratio_b) = steps
    mfu, mfu_b = (f"{a:.1f} and {b:.1f} %" for a, b in used)
    assert f"{ours:.1f} and {theirs:.1f} ms on A ({ratio:.2f} times as fast; MFU {mfu})" in said
    assert f"{ours_b:.1f} and {theirs_b:.1f} ms on B ({ratio_b:.2f} times; {mfu_b})" in said
    assert "with {:.1f} and {:.1f} GiB at the most on A, and {:.1f} and {:.1f} on B".format(*gib[0], *gib[1]) in said
    assert f"({alike[0]:.2f} times)" in words("docs/speed.md")
    assert f"({alike[1]:.2f} times)" in words("docs/speed.md")


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
    assert f"take {masked:.0f} ms a step masked and {packed:.0f} packed in one call, but {compiled:.0f} packed" in text
    assert f"within {errors['bfloat16']:.1%}".replace("%", " %") in text
    assert f"within {errors['float32']:.1e}".replace("e-0", "e-") in text
