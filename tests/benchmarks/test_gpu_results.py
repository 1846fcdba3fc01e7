"""What documents say of GPUs, and of generation on a CPU, is what the machine gave."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.train_step import OTHERS, by_kind
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


def test_docs_have_what_a_gpu_generated() -> None:
    found, text = result("generation"), words("docs/generate.md")
    one, many = found["results"]["olmoe"]
    for row in (one, many):
        theirs, ours = row["transformers"], row["tedlab"]
        speeds = f"{theirs['tokens_per_second']:,.0f} | {ours['tokens_per_second']:,.0f} | {row['ratio']:.2f}"
        firsts = f"{1e3 * theirs['first_s']:.0f} | {1e3 * ours['first_s']:.0f}"
        assert f"| {row['batch']} | {speeds} | {firsts} |" in text
        assert row["experts"] == "grouped_mm"
    assert f"A token of one text takes tedlab {1e3 / one['tedlab']['tokens_per_second']:.2f} ms" in text
    assert one["texts_alike"] == 0
    assert f"token for token, and {32 * many['texts_alike']:.0f} of the 32 are" in text
    assert (
        "So {:,.0f} and {:,.0f} tokens/s are those of `batched_mm`".format(
            *(row["transformers"]["tokens_per_second"] for row in (one, many))
        )
        in text
    )
    on_cpu = json.loads((ROOT / "benchmarks/results/generation_cpu_bf16.json").read_text())
    (narrow,) = on_cpu["results"]["olmoe"]
    assert f"prompts of {found['prompt']} tokens, {found['tokens']} tokens added" in text
    assert f"prompts of {on_cpu['prompt']} tokens and {on_cpu['tokens']} added (`--bf16`" in text
    assert found["dtype"] == on_cpu["dtype"] == "bfloat16"
    command = f"benchmarks.generation olmoe --set {found['overrides']['olmoe'][-1]} --batches 1 32"
    assert command in text
    assert command in words("benchmarks/README.md")
    assert f"{32 * narrow['texts_alike']:.0f} of 32 are" in text
    assert f"differ by at most {narrow['steps_apart']:.0f} steps of bf16" in text


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


def on_two() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows of all calls on two GPUs by case and name, as they were measured."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for call in result("expert_parallel_table"):
        for row in call["rows"]:
            found.setdefault((row["case"], row["name"]), []).append(row)
    return found


TWO = "tedlab, expert 2"
PEERS = {"plain loop": "plain loop", "Megatron-Core's dispatcher": "Megatron-Core", "DeepSpeed's layer": "DeepSpeed"}


def test_docs_have_what_two_gpus_took() -> None:
    rows, said, short = on_two(), words("benchmarks/README.md"), words("docs/speed.md")
    lines = {"tedlab, one GPU": "tedlab, one GPU", "torchtitan 0.2.2": "torchtitan, expert 2", "tedlab": TWO}
    lines |= {"plain loop": "plain loop, expert 2", "Megatron-Core 0.16.1's dispatcher": "Megatron-Core, expert 2"}
    lines |= {"DeepSpeed 0.19.8's layer": "DeepSpeed, expert 2", "tedlab, experts lent": f"{TWO}, experts lent"}
    lines |= {f"tedlab, `comm.{way}`": f"{TWO}, comm.{way}" for way in ("dedup=rank", "dedup=group", "chunks=2")}
    lines |= {"tedlab, two micro-batches in turn": f"{TWO}, 2 micro-batches"}
    beside = "tedlab, two micro-batches beside each other (`comm.interleave=true`)"
    lines |= {beside: f"{TWO}, 2 beside each other"}
    lines |= {"tedlab, tensor 2: one micro-batch on both GPUs": "tedlab, tensor 2"}
    for label, name in lines.items():
        assert cells(label, *(", ".join(map(ms, rows.get((case, name), ()))) for case in "ABC")) in said
    assert {name for _, name in rows} == {*lines.values()}
    # Beside the row of tedlab in the peers' call: on A the first, on B the second, on C the one without a profile.
    plain = {"A": rows["A", TWO][0], "B": rows["B", TWO][1], "C": rows["C", TWO][1]}
    ways = [(way, f"{TWO}, comm.dedup={way}") for way in ("rank", "group")]
    alike, other = dict[str, float](), dict[tuple[str, str], float]()
    steps = []
    for case, row in plain.items():
        theirs = {label: rows[case, key][-1] for label in PEERS if (case, key := f"{PEERS[label]}, expert 2") in rows}
        label = min(theirs, key=lambda label: theirs[label]["passes_s"])
        best = theirs[label]
        alike[case] = best["passes_s"] / row["passes_s"]
        own = {way: rows[case, name][0] for way, name in ways if (case, name) in rows}
        other |= {(case, way): best["passes_s"] / each["passes_s"] for way, each in own.items()}
        figures = ms(rows[case, "tedlab, one GPU"][0]), ms(row), ms(own.get("rank")), ms(own.get("group"))
        gathered = f"{other[case, 'group']:.2f} ×" if (case, "group") in other else ""
        assert cells(*figures, f"{ms(best)}, {label}", f"{alike[case]:.2f} ×", gathered) in short
        steps.append((own.get("group", row), best))
    a, b, c = (f"{ratio:.2f}" for ratio in alike.values())
    assert f"is {a} times as fast as the best of them on A (Megatron-Core's dispatcher), {b} on B (the plain" in said
    assert f"loop) and {c} on C" in said
    rank, gathered, on_b = (f"{other[key]:.2f}" for key in (("A", "rank"), ("A", "group"), ("B", "group")))
    assert f"On A it is {rank} times as fast with pilots, and with gathered tokens {gathered} and {on_b} times" in said
    taken = [(1e3 * ours["step_s"], 1e3 * peer["step_s"], peer["step_s"] / ours["step_s"]) for ours, peer in steps]
    mfu, mfu_b, _ = (f"{100 * ours['mfu']:.1f} and {100 * peer['mfu']:.1f} %" for ours, peer in steps)
    assert "{:.1f} and {:.1f} ms on A ({:.2f} times as fast; MFU {})".format(*taken[0], mfu) in said
    assert "{:.1f} and {:.1f} ms on B ({:.2f} times; {})".format(*taken[1], mfu_b) in said
    profiled, deepspeed = rows["C", TWO][0], rows["C", "DeepSpeed, expert 2"][-1]
    assert ["profile" in row for row in (profiled, plain["C"], deepspeed)] == [True, False, False]
    ratio, of_steps = (deepspeed[key] / profiled[key] for key in ("passes_s", "step_s"))
    assert f"without `--profile` ({ratio:.2f} with it on tedlab's)" in said
    assert f"with a profile took {ms(profiled)} ms on C ({ratio:.2f} times as fast as DeepSpeed's layer)" in short
    in_step = "takes {:.1f} ms, and DeepSpeed's {:.1f} ({:.2f} times as fast;".format(*taken[2])
    assert f"{in_step} {1e3 * profiled['step_s']:.1f} and {of_steps:.2f} times with `--profile`)" in said
    tensor, of_c = (1e3 * rows[case, "tedlab, tensor 2"][0]["passes_s"] for case in "AC")
    assert f"Tensor 2 takes {of_c:.1f} with one micro-batch on both" in short
    assert f"on C chunks take {ms(rows['C', f'{TWO}, comm.chunks=2'][0])}" in short
    for document in (said, short):
        assert f"{tensor:.1f}" in document
        assert f"{2 * tensor:.1f} for as many tokens per GPU as the other rows" in document
    others = [row for call in result("expert_parallel_more") for row in call["rows"]]
    assert {row["case"] for row in others} == {*"ABDEZ"}  # rows of C had wrong gradients
    more = [row for row in others if row["case"] == "B"]
    assert [row["name"] for row in more] == [ways[1][1], TWO, ways[1][1]]  # the last two of one call
    other_call, *earlier = (ms(row) for row in more)
    assert (
        f"{ms(rows['B', ways[1][1]][0])} to {ms(rows['B', TWO][1])} here; {earlier[1]} and {earlier[0]} in an" in short
    )
    assert f"in an earlier call {earlier[1]} and {earlier[0]} " in said
    assert f"{earlier[0]} ms with rows and {earlier[1]} gathered, and {other_call} gathered" in said
    whole = "Whole steps are {:.2f} (A, gathered), {:.2f} (B, gathered) and {:.2f} (C, {:.1f} and {:.1f} ms) times"
    assert whole.format(*(ratio for *_, ratio in taken), *taken[2][:2]) in short
    gib = [row["peak_gib"] for pair in steps[:2] for row in pair]
    assert "with {:.1f} and {:.1f} GiB at the most on A, and {:.1f} and {:.1f} on B".format(*gib) in said
    alone = rows["B", "plain loop, expert 2"][0]["passes_s"] / rows["B", "tedlab, one GPU"][0]["passes_s"]
    assert f"which is only {alone:.2f} times as fast as the loop on two" in said
    assert f"one GPU is only {alone:.2f} times as fast as the loop on two" in short
    one = rows["C", "tedlab, one GPU"][0]
    assert f"| C at most 40 ms | {ms(plain['C'])}; one GPU takes {ms(one)} | missed |" in said
    assert f"C misses 40 ms: one GPU takes {ms(one)}." in short
    forward, backward = (
        "{:.1f}{} instead of {:.1f}".format(1e3 * plain["C"]["phases_s"][part], unit, 1e3 * one["phases_s"][part])
        for part, unit in (("forward", " ms"), ("backward", ""))
    )
    more_than_one = 1e3 * (plain["C"]["passes_s"] - one["passes_s"])
    assert f"Two add {more_than_one:.1f} ms: forward takes {forward}, and backward {backward}." in said
    assert f"DeepSpeed's rows end with one of {deepspeed['loss']:.0f}," in said
    forward = [1e3 * rows["A", name][0]["phases_s"]["forward"] for name in (ways[1][1], TWO, ways[0][1])]
    assert "Forward, A takes {:.1f} ms gathered, {:.1f} with rows and {:.1f} with pilots".format(*forward) in said


def test_docs_have_the_profiles_of_two_gpus() -> None:
    rows, said = on_two(), words("benchmarks/README.md")
    names = [TWO, *(f"{TWO}, comm.{way}" for way in ("dedup=rank", "dedup=group", "chunks=2")), "tedlab, one GPU"]
    before = {"collectives": 29.3, "… while nothing else runs": 29.3, "grouped products": 29.2, "kernels of rows": 69.5}
    table: dict[str, list[str]] = {}
    spans: list[float] = []  # in which the device is busy
    for name in names:
        row = rows["A", name][0]
        whole, *lines = row["profile"]
        listed = [re.fullmatch(r" *(\S+) ms +\d+ × ([^→]*)", line) for line in lines]
        kinds = by_kind((found[2], float(found[1])) for found in listed if found)
        waits = [[float(x) for x in re.findall(r"[\d.]+", line)[:2]] for line in lines if "alone:" in line]
        alone, collectives = (sum(column) for column in zip(*waits, strict=True)) if waits else (0.0, 0.0)
        kinds = {"collectives": collectives, "… while nothing else runs": alone} | kinds | {"collectives": collectives}
        named = sum(taken for kind, taken in kinds.items() if kind not in ("… while nothing else runs", OTHERS))
        kinds[OTHERS] = float(whole.split()[0]) - named  # those that are not listed, too
        spans.append(float(whole.split()[0]) - collectives + alone)
        kinds["idle"] = next(float(line.split()[0]) for line in lines if line.endswith("ms idle"))
        kinds["the median step, which is not profiled"] = 1e3 * row["step_s"]
        for kind, taken in kinds.items():
            table.setdefault(kind, []).append(f"{taken:.1f}" if taken else "")
    idle, steps = ([float(figure) for figure in table[kind]] for kind in (*table,)[-2:])
    chunked, plain = names.index(f"{TWO}, comm.chunks=2"), 0
    both = [
        (spans[each] + idle[each], steps[each], spans[each], steps[each] - spans[each]) for each in (chunked, plain)
    ]
    profiled, median, busy, room = ("{:.1f} and {:.1f}".format(*pair) for pair in zip(*both, strict=True))
    assert f"profiled steps take {profiled} ms, and the median steps {median}. Kernels keep the device busy for" in said
    assert f"busy for {busy} ms, so steps that are not profiled have room for at most {room} ms" in said
    assert f"the median step is {steps[chunked] - steps[plain]:.1f} ms longer" in words("docs/speed.md")
    for kind, figures in table.items():
        assert cells(kind, f"{before[kind]}" if kind in before else "", *figures) in said
    rest = float(table["kernels of rows"][0]) + float(table[OTHERS][0])
    assert f"at most {rest:.1f} ms, on a GPU" in said
    bare = {row["mib"]: row["ms"] for row in result("exchanges")["rows"] if row["way"] == "all_to_all"}
    assert f"16 bare exchanges of rows need {16 * bare[512]:.1f} ms" in said
    assert f"16.3 of {16 * bare[512]:.1f} ms in chunks" in said
    (slots, alone), (in_chunks, exposed) = (
        [line.split() for line in rows["C", name][0]["profile"] if "SendRecv" in line]
        for name in (TWO, f"{TWO}, comm.chunks=2")
    )
    assert [slots[2], in_chunks[2]] == ["8", "16"]  # of two MoE layers, there and back in both passes
    assert f"lists the {slots[2]} exchanges that the ledger counts, in which nothing else runs for" in said
    assert (
        f"nothing else runs for {float(alone[0]):.1f} ms; 8 bare ones of slots (64 MiB) need {8 * bare[64]:.1f}" in said
    )
    assert f"In chunks it lists {in_chunks[2]}, beside which nothing runs for {float(exposed[0]):.1f} ms" in said
    assert exposed[0] == in_chunks[0]  # they hide nothing
    assert f"Eight bare exchanges of rows (256 MiB) need {8 * bare[256]:.1f} ms" in said


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
        "tedlab": "tedlab, expert 4",
        **{f"tedlab, `comm.dedup={way}`": f"tedlab, expert 4, comm.dedup={way}" for way in ("rank", "group")},
        **{"tedlab, experts lent": "tedlab, expert 4, experts lent"},
        **{"tedlab, `comm.chunks=2`": "tedlab, expert 4, comm.chunks=2"},
    }
    for label, name in lines.items():
        assert cells(label, *(ms(rows.get((case, name))) for case in "ABDEZ")) in said
    ways = [
        "tedlab, one GPU",
        "tedlab, expert 4",
        *(f"tedlab, expert 4, comm.dedup={way}" for way in ("rank", "group")),
    ]
    alike, gathered = dict[str, float](), dict[str, float]()
    for case in "AB":
        best = min((*lines,)[1:4], key=lambda label: rows[case, lines[label]]["passes_s"])
        theirs = rows[case, lines[best]]["passes_s"]
        alike[case] = theirs / rows[case, ways[1]]["passes_s"]
        gathered[case] = theirs / rows[case, ways[3]]["passes_s"]
        ratios = [f"{of[case]:.2f} ×" for of in (alike, gathered)]
        taken = [ms(rows.get((case, way))) for way in ways]
        assert cells(*taken, f"{ms(rows[case, lines[best]])}, {best}", *ratios) in short
    assert cells(*(ms(rows["E", way]) for way in ways), "", "", "") in short
    a, b = (f"{ratio:.2f}" for ratio in alike.values())
    assert f"is {a} times as fast as the best of them on A and {b} on B" in said
    rank = rows["A", lines["Megatron-Core's dispatcher"]]["passes_s"] / rows["A", ways[2]]["passes_s"]
    assert f"it is {rank:.2f} and {gathered['A']:.2f} times as fast on A" in said
    assert f"with gathered tokens {gathered['B']:.2f} times on B" in said
    alone = rows["B", "plain loop, expert 4"]["passes_s"] / rows["B", ways[0]]["passes_s"]
    assert f"one GPU without exchanges is only {alone:.2f} times as fast as the loop on four" in said
    assert f"one GPU without exchanges is only {alone:.2f} times as fast as the loop on four" in short
    peers = [name for case, name in rows if case == "C"]
    assert peers == ["DeepSpeed, expert 4", "DeepSpeed, expert 2"]
    taken = "DeepSpeed's layer took {} ms on all four, and {} on two of them"
    assert taken.format(*(ms(rows["C", name]) for name in peers)) in said
    lent = rows["Z", "tedlab, expert 4, experts lent"]
    gib = [f"{row['peak_gib']:.1f}" for row in (lent, rows["Z", ways[1]])]
    zipf = f"{ms(lent)} ms instead of {ms(rows['Z', ways[1]])}, and {gib[0]} GiB at the most instead of {gib[1]}"
    assert f"Z takes {zipf}" in said
    assert f"from {ms(rows['Z', ways[1]])} to {ms(lent)} ms, and from {gib[1]} to {gib[0]} GiB" in words("docs/llep.md")
    assert f"{ms(rows['Z', ways[1]])} ms, {ms(rows['Z', ways[3]])} gathered, and {ms(lent)} with experts lent" in short


def test_docs_have_whole_steps_memory_overlap_and_tensor_ranks_on_four_gpus() -> None:
    rows, said = on_four(), words("benchmarks/README.md")
    whole = "tedlab, expert 4", "tedlab, expert 4, comm.dedup=group"
    peers = {"A": "Megatron-Core, expert 4", "B": "plain loop, expert 4"}
    steps = {case: [1e3 * rows[case, name]["step_s"] for name in (*whole, peer)] for case, peer in peers.items()}
    a, b = ("{:.1f}, {:.1f} and {:.1f}".format(*steps[case]) for case in "AB")
    assert f"take {a} ms on A, and {b} on B" in said
    a, b = (taken[-1] / taken[0] for taken in steps.values())
    assert f"with rows tedlab is {a:.2f} times as fast on A and {b:.2f} on B" in said
    assert f"Of whole steps the ratios of rows are {a:.2f} on A and {b:.2f} on B" in words("docs/speed.md")
    ours, theirs = (
        [1e3 * rows[case, name]["phases_s"]["optimizer"] for case, name in names]
        for names in ([(case, whole[0]) for case in peers], peers.items())
    )
    of_ours, of_theirs = ("{:.1f} and {:.1f}".format(*each) for each in (ours, theirs))
    assert f"optimizer takes {of_ours} ms of these, and that of the peers {of_theirs}," in said
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
