"""Experts on several GPUs: forward and backward of tedlab beside a loop in plain torch, and beside tedlab on one GPU.

    python -m benchmarks.expert_parallel                 # all cases, on two GPUs
    python -m benchmarks.expert_parallel --processes 4   # on four: experts on all, or on half beside tensor 2
    python -m benchmarks.expert_parallel A --rows 'tedlab, expert 2' --profile 30
    python -m benchmarks.expert_parallel --tiny          # the same in a minute on a CPU, to see that it works

See README.md for the cases and for what is alike and what is not.
"""

import argparse
import json
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.peer_layers import PEERS, missing, versions
from benchmarks.processes import Row, measure
from benchmarks.steps import composed
from benchmarks.surroundings import surroundings
from tedlab.launch.launcher import launch

_LLAMA = ["model.activation=swiglu", "model.norm=rms", "model.positions=rotary", "model.bias=false"]
_LLAMA += ["model.tie_embeddings=false", "moe.dispatch=dropless", "moe.every=1", "model.sequence_length=4096"]
_EACH = ["trainer=gpu", "trainer.precision=bf16-true", "model.vocab_size=8192", "optim.tile=fused", "optim.lr=1e-6"]
_EACH += ["model.compile=inductor", "parallel=single", "moe.aux_loss=0.01"]
CASES = {
    "A": [
        *("model=olmoe_1b_7b", "moe=olmoe", *_LLAMA, "model.layers=4", "model.hidden=2048", "model.heads=16"),
        *("model.qk_norm=none", "model.ffn=1024", "moe.num_experts=64", "moe.top_k=8", "data.micro_batch_size=4"),
    ],
    "B": [
        *("model=olmoe_1b_7b", "moe=olmoe", *_LLAMA, "model.layers=2", "model.hidden=4096", "model.heads=32"),
        *("model.qk_norm=none", "model.ffn=14336", "moe.num_experts=8", "moe.top_k=2", "data.micro_batch_size=4"),
    ],
    "C": [
        *("model=gpt_1.3b", "moe=paper16", "model.layers=4", "moe.num_experts=16", "moe.top_k=1", "moe.every=2"),
        *("moe.capacity_factor=1.0", "data.micro_batch_size=8"),
    ],
    "D": ["preset=deepseek_v2_lite", "model.layers=4", "model.sequence_length=4096", "data.micro_batch_size=4"],
    "E": ["preset=qwen3_30b_a3b", "model.layers=3", "model.sequence_length=4096", "data.micro_batch_size=4"],
}
CASES["Z"] = [*CASES["A"], "moe.gating=zipf", "model.compile=none"]  # a router of one's own is not compiled
TITLES = {
    "A": "4 blocks of OLMoE (2048, 64 × 1024, top-8), 4 × 4,096 tokens per GPU",
    "B": "2 blocks of Mixtral (4096, 8 × 14336, top-2), 4 × 4,096 tokens per GPU",
    "C": "4 blocks of TED 1.3B (2048, 16 × 8192, top-1, every second, capacity 1), 8 × 2,048 tokens per GPU",
    "D": "4 blocks of DeepSeek-V2-Lite (2048, 64 × 1408, top-6, 2 shared, the first dense), 4 × 4,096 tokens per GPU",
    "E": "3 blocks of Qwen3-30B-A3B (2048, 128 × 768, top-8), 4 × 4,096 tokens per GPU",
    "Z": "A with experts chosen by Zipf's law, exponent 1.2",
}
TINY = ["trainer=cpu", "trainer.precision=32-true", "model.compile=none", "model.hidden=64", "model.heads=4"]
TINY += ["model.ffn=32", "model.sequence_length=32", "model.vocab_size=256", "optim.tile=null"]


_DEDUP = ("rank", "group")
_LENT = ("moe.lend.policy=llep", "moe.lend.minimum=64")
_PAPER = ("none", "dtd", "cac", "ted", "ted_fused")  # configurations of comm


def rows(n: int) -> list[Row]:
    """Returns what is measured on n GPUs: experts on all of them, half as many beside tensor 2, tensor n, one GPU."""
    whole, half = f"tedlab, expert {n}", f"tedlab, tensor 2 x expert {n // 2}"
    recomputed = "model.recompute.granularity=block"
    beside_tensor = [
        Row(half, n, tensor=2),
        *(Row(f"{half}, comm.dedup={way}", n, (f"comm.dedup={way}",), 2, cases="ABDEZ") for way in _DEDUP),
        Row(f"{half}, comm=dtd", n, ("comm=dtd",), 2),
        *(Row(f"{half}, recomputed, comm={way}", n, (recomputed, f"comm={way}"), 2, cases="C") for way in _PAPER),
    ]
    return [
        *(Row(f"{peer}, expert {n}", n, peer=peer, cases="C" if peer == "DeepSpeed" else "AB") for peer in PEERS),
        Row(whole, n),
        *(Row(f"{whole}, comm.dedup={way}", n, (f"comm.dedup={way}",), cases="ABDEZ") for way in _DEDUP),
        Row(f"{whole}, comm.chunks=2", n, ("comm.chunks=2",)),
        Row(f"{whole}, 2 micro-batches", n, cases="AB", micro_batches=2),
        Row(f"{whole}, 2 beside each other", n, ("comm.interleave=true",), cases="AB", micro_batches=2),
        Row(f"{whole}, experts lent", n, _LENT, cases="AEZ"),
        *(beside_tensor if n > 2 else ()),
        Row(f"tedlab, tensor {n}", n, tensor=n),
        Row("plain loop, one GPU", 1, peer="plain loop", cases="AB"),
        Row("tedlab, one GPU", 1),
    ]


def attempt(row: Row) -> dict[str, Any]:
    """Measures a row; of its processes the slowest counts."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            launch(measure, replace(row, output_dir=folder), row.processes)
        except Exception:
            return {"name": row.name, "error": traceback.format_exc()}
        found = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    slowest = max(found, key=_passes)
    asked = {"name": row.name, "processes": row.processes, "overrides": row.overrides}
    return asked | {"passes_s": _passes(slowest), **slowest}


def _passes(found: dict[str, Any]) -> float:
    return float(found["phases_s"]["forward"] + found["phases_s"]["backward"])


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """For people."""
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "forward", "backward", "both, ms", "optimizer", "peak GiB"):
        result.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        if "error" in row:
            result.add_row(row["name"], row["error"].strip().splitlines()[-1][:60])
            continue
        parts = [1e3 * row["phases_s"].get(name, 0.0) for name in ("forward", "backward", "optimizer")]
        times = (parts[0], parts[1], parts[0] + parts[1], parts[2])
        result.add_row(row["name"], *(f"{time:.1f}" for time in times), f"{row['peak_gib']:.1f}")
    return result


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.expert_parallel",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--processes", type=int, default=2, help="as many GPUs, an even number (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", help="to measure (default: all)")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of all cases")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="list the N longest kernels of a step")
    parser.add_argument("--tiny", action="store_true", help="tiny models on CPUs")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    chosen = rows(arguments.processes)
    if unknown := set(arguments.rows or ()) - {row.name for row in chosen}:
        parser.error(f"no rows: {sorted(unknown)}; there are {[row.name for row in chosen]}")
    device = torch.device("cpu" if arguments.tiny else "cuda")
    facts, results = surroundings(device) | versions(), dict[str, list[dict[str, Any]]]()
    for case in arguments.cases:
        overrides = (*_EACH, *CASES[case], *(TINY if arguments.tiny else ()), *arguments.set)
        samples = composed(list(overrides)).data.micro_batch_size
        results[case] = []
        for row in chosen:
            if case not in row.cases or row.name not in (arguments.rows or [row.name]):
                continue
            if (package := missing(row.peer)) is not None:
                print(f"{case}, {row.name}: {package} is not installed", flush=True)
                continue
            asked = row.configured(overrides, samples)
            last = attempt(replace(row, overrides=asked, steps=arguments.steps, profile=arguments.profile))
            results[case].append(last)
            said = last.get("error") or f"{1e3 * last['passes_s']:.1f} ms, step {1e3 * last['step_s']:.1f}"
            print(f"{case}, {row.name}: {said}", flush=True)
            print(last.get("profile", ""), flush=True)
            if arguments.out is not None:  # what has been measured is kept when a later row hangs
                arguments.out.write_text(json.dumps(facts | {"results": results}, indent=2) + "\n")
        Console(width=130).print(table(results[case], f"{case}: {TITLES[case]}; {facts['device']}"))


if __name__ == "__main__":
    main()
