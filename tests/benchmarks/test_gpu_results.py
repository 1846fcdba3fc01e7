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


def largest(rows: list[dict[str, Any]], precision: str) -> float:
    return max(row["largest_error"] for row in rows if row["precision"] == precision)


def test_docs_have_the_largest_errors_of_certificates_over_nccl() -> None:
    two, four = result("test_gpu_x2"), result("test_gpu_x4")
    degrees = "processes", "tensor", "expert", "expert_tensor"  # the last of folded layouts
    for rows, gpus in ((two["certificates"], 2), (four["certificates"], 4), (four["certificates_of_two"], 2)):
        cells = [(tuple(row[name] for name in degrees if name in row), row["job"], row["precision"]) for row in rows]
        assert cells == [cell for cell in CELLS if cell[0][0] == gpus]
    for found, documents in ((two, ["certify"]), (four, ["certify", "reliability"])):
        worst = [largest(found["certificates"], precision) for precision in ("64-true", "bf16-true")]
        said = "errors of at most {:.1e} in float64 and {:.2g} of the norm in bf16".format(*worst)
        assert all(said in words(f"docs/{document}.md") for document in documents)
    for precision in ("64-true", "bf16-true"):
        assert largest(four["certificates_of_two"], precision) == largest(two["certificates"], precision)


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


def on_four() -> dict[tuple[str, str], dict[str, Any]]:
    """Rows on four GPUs by case and name; of a row that ran twice the first."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for call in result("expert_parallel_four"):
        assert call["device"] == "NVIDIA H200"
        for row in call["rows"]:
            found.setdefault((row["case"], row["name"]), row)
    return found


def ms(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{1e3 * row['passes_s']:.1f}"


def cells(*texts: str) -> str:
    return " ".join("|" + (f" {text}" if text else "") for text in texts) + " |"


def test_docs_have_what_four_gpus_took() -> None:
    rows, said, short = on_four(), words("benchmarks/README.md"), words("docs/speed.md")
    lines = {
        **{"tedlab, one GPU": "tedlab, one GPU", "plain loop": "plain loop, expert 4"},
        **{"torchtitan": "torchtitan, expert 4", "Megatron-Core's dispatcher": "Megatron-Core, expert 4"},
        **{"DeepSpeed's layer": "DeepSpeed, expert 4", "tedlab": "tedlab, expert 4"},
        **{f"tedlab, `comm.dedup={way}`": f"tedlab, expert 4, comm.dedup={way}" for way in ("rank", "group")},
        **{"tedlab, experts lent": "tedlab, expert 4, experts lent"},
        **{"tedlab, `comm.chunks=2`": "tedlab, expert 4, comm.chunks=2"},
    }
    for label, name in lines.items():
        assert cells(label, *(ms(rows.get((case, name))) for case in "ABCDEZ")) in said
    ways = [
        "tedlab, one GPU",
        "tedlab, expert 4",
        *(f"tedlab, expert 4, comm.dedup={way}" for way in ("rank", "group")),
    ]
    alike, gathered = dict[str, float](), dict[str, float]()
    for case in "ABC":
        peers = [label for label in (*lines,)[1:5] if (case, lines[label]) in rows]
        best = min(peers, key=lambda label: rows[case, lines[label]]["passes_s"])
        theirs = rows[case, lines[best]]["passes_s"]
        alike[case] = theirs / rows[case, ways[1]]["passes_s"]
        if (case, ways[3]) in rows:
            gathered[case] = theirs / rows[case, ways[3]]["passes_s"]
        ratios = [f"{of[case]:.2f} ×" if case in of else "" for of in (alike, gathered)]
        taken = [ms(rows.get((case, way))) for way in ways]
        assert cells(*taken, f"{ms(rows[case, lines[best]])}, {best}", *ratios) in short
    assert cells(*(ms(rows["E", way]) for way in ways), "", "", "") in short
    a, b, c = (f"{ratio:.2f}" for ratio in alike.values())
    assert f"is {a} times as fast as the best of them on A, {b} on B and {c} on C" in said
    rank = rows["A", lines["Megatron-Core's dispatcher"]]["passes_s"] / rows["A", ways[2]]["passes_s"]
    assert f"it is {rank:.2f} and {gathered['A']:.2f} times as fast on A" in said
    assert f"with gathered tokens {gathered['B']:.2f} times on B" in said
    assert f"C comes to {alike['C']:.3f}" in short
    alone = rows["B", "plain loop, expert 4"]["passes_s"] / rows["B", ways[0]]["passes_s"]
    assert f"one GPU without exchanges is only {alone:.2f} times as fast as the loop on four" in said
    assert f"one GPU without exchanges is only {alone:.2f} times as fast as the loop on four" in short
    two = ms(rows["C", "tedlab, expert 2"]), ms(rows["C", "DeepSpeed, expert 2"])
    ratio = rows["C", "DeepSpeed, expert 2"]["passes_s"] / rows["C", "tedlab, expert 2"]["passes_s"]
    assert "C takes {} ms, and DeepSpeed's layer {} ({:.2f} times)".format(*two, ratio) in said
    lent = rows["Z", "tedlab, expert 4, experts lent"]
    gib = [f"{row['peak_gib']:.1f}" for row in (lent, rows["Z", ways[1]])]
    zipf = f"{ms(lent)} ms instead of {ms(rows['Z', ways[1]])}, and {gib[0]} GiB at the most instead of {gib[1]}"
    assert f"Z takes {zipf}" in said
    assert f"from {ms(rows['Z', ways[1]])} to {ms(lent)} ms, and from {gib[1]} to {gib[0]} GiB" in words("docs/llep.md")
    assert f"{ms(rows['Z', ways[1]])} ms, {ms(rows['Z', ways[3]])} gathered, and {ms(lent)} with experts lent" in short


def test_docs_have_whole_steps_memory_overlap_and_tensor_ranks_on_four_gpus() -> None:
    rows, said = on_four(), words("benchmarks/README.md")
    whole = "tedlab, expert 4", "tedlab, expert 4, comm.dedup=group"
    peers = {"A": "Megatron-Core, expert 4", "B": "plain loop, expert 4", "C": "DeepSpeed, expert 4"}
    steps = {
        case: [1e3 * rows[case, name]["step_s"] for name in (*whole, peer) if (case, name) in rows]
        for case, peer in peers.items()
    }
    a, b = ("{:.1f}, {:.1f} and {:.1f}".format(*steps[case]) for case in "AB")
    assert f"take {a} ms on A, and {b} on B" in said
    assert "on C they take {:.1f} (slots) and {:.1f} ms".format(*steps["C"]) in said
    a, b, c = (taken[-1] / taken[0] for taken in steps.values())
    assert f"tedlab is {a:.2f} times as fast on A, {b:.2f} on B and {c:.2f} on C" in said
    short = f"{a:.2f} on A, {b:.2f} on B and {c:.2f} on C " + "({:.1f} and {:.1f} ms)".format(*steps["C"])
    assert f"Of whole steps these ratios are {short}" in words("docs/speed.md")
    ours, theirs = (
        [1e3 * rows[case, name]["phases_s"]["optimizer"] for case, name in names]
        for names in ([(case, whole[0]) for case in peers], peers.items())
    )
    of_ours, of_theirs = ("{:.1f}, {:.1f} and {:.1f}".format(*each) for each in (ours, theirs))
    assert f"optimizer takes {of_ours} ms of these, and that of the peers {of_theirs}," in said
    assert f"DeepSpeed's rows end with one of {rows['C', peers['C']]['loss']:.0f}," in said
    (a, more), (b, much) = ([rows[case, name]["peak_gib"] for name in whole] for case in "AB")
    assert f"{more:.1f} GiB at the most instead of {a:.1f} on A, {much:.1f} instead of {b:.1f} on B" in said
    turn, beside = (rows["A", f"tedlab, expert 4, 2 {how}"] for how in ("micro-batches", "beside each other"))
    less = 1 - beside["passes_s"] / turn["passes_s"]
    two = f"take A {ms(turn)} ms in turn and {ms(beside)} beside each other, {less:.1%} less".replace("%", " %")
    assert f"{two}; compiled, two in turn would take twice {ms(rows['A', whole[0]])}" in said
    half = "tedlab, tensor 2 x expert 2"
    plain, gathered, dtd = (ms(rows["A", f"{half}{way}"]) for way in ("", ", comm.dedup=group", ", comm=dtd"))
    assert f"A takes {plain} ms, {gathered} with `group`, and {dtd} with `comm=dtd`" in said
    assert f"({dtd} ms instead of {plain})" in words("docs/speed.md")
    ablation = [rows["C", f"{half}, recomputed, comm={way}"] for way in ("none", "dtd", "cac", "ted")]
    taken = "{} ms (`comm=none`), {} (`dtd`), {} (`cac`) and {} (`ted`)".format(*map(ms, ablation))
    again = result("expert_parallel_four")[-1]["rows"][0]
    forward = [1e3 * row["phases_s"]["forward"] for row in (again, ablation[0])]
    assert again["name"] == ablation[0]["name"]
    assert f"{taken}; `none` took {ms(again)}" in said
    assert "of which {:.1f} forward instead of {:.1f}".format(*forward) in said


def test_docs_have_the_profile_of_gathered_tokens_on_four_gpus() -> None:
    (profile,) = (row["profile"] for call in result("expert_parallel_four") for row in call["rows"] if "profile" in row)
    kernels = [line for line in profile if "→" not in line]  # others are pauses between two
    nccl = [float(line.split()[0]) for line in kernels if "ncclDevKernel" in line]
    (waits,) = (line for line in profile if "ReduceScatter_Sum_f32" in line)
    assert waits.split()[2:4] == ["4", "×"]
    said = words("benchmarks/README.md")
    (idle,) = (float(line.split()[0]) for line in profile if line.endswith("ms idle"))
    assert f"has {float(profile[0].split()[0]):.1f} ms of kernels, of which NCCL's" in said
    assert f"are {sum(nccl):.1f}, and {idle:.1f} ms in which the device is idle" in said
    assert f"Of NCCL's, {float(waits.split()[0]):.1f} ms are four reduce-scatters" in said


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
