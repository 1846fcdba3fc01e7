"""Tokens per second of generated text, and the wait for the first one: tedlab and transformers, with the same weights.

    pip install -e '.[transformers]'
    python -m benchmarks.generation                       # on a GPU the published shapes, on a CPU small ones
    python -m benchmarks.generation olmoe --batches 1 32

Both take the most probable token each time, in bf16 on a GPU and fp32 on a CPU, with keys and values cached. Neither
compiles. Prompts are random tokens of one length, so that transformers needs no padding. Each figure is the best of
several rounds, in which all take turns: tedlab, and transformers with each of its ways to compute experts. Tables have
the fastest of these, for the first token and for those after it. On GPUs transformers itself decodes with batched_mm
after a prompt with grouped_mm.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.steps import composed, drawn_there
from benchmarks.surroundings import require, surroundings
from benchmarks.vs_transformers import SHAPES, Shape, peer_model
from tedlab.decode import continuations
from tedlab.exchange.imports import open_folder, read_pieces
from tedlab.models import GPT
from tedlab.sampling import Sampling
from tedlab.topology import Topology

_CPU = ["model.layers=4", "model.hidden=256", "model.heads=8", "model.ffn=256", "model.sequence_length=512"]
_CPU += ["model.vocab_size=8192", "moe.num_experts=16", "model.compile=none"]
_GPU = ["model.sequence_length=2048", "model.compile=none"]
_ROUNDS = 5
# Of transformers to compute experts; the first is its default. A third, batched_mm, copies an expert for each row, too
# much for prompts.
_WAYS = ("grouped_mm", "eager")

Contender = Callable[[Tensor, int], list[list[int]]]  # returns the tokens that it adds to each prompt


def both(shape: Shape, overrides: list[str], device: torch.device, dtype: torch.dtype) -> tuple[GPT, Any]:
    """Returns tedlab's model and transformers', with the same random weights."""
    config = composed([*shape.overrides, *overrides])
    theirs: Any = peer_model(shape, config, device).eval()
    theirs = theirs.to(dtype)
    theirs.generation_config.use_cache = True  # copied from the configuration of a model that trains
    moe = replace(config.moe, capacity_factor=None)
    with patch("tedlab.models.gpt.initialize", drawn_there):  # to be replaced by theirs
        ours = GPT(config.model, moe, Topology.single(device), seed=0).eval().to(dtype)
    own: dict[str, Any] = dict(ours.named_parameters())
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs.save_pretrained(folder)
        for piece in read_pieces(open_folder(Path(folder))):
            local = own[piece.name].detach().to_local()
            (local if piece.row is None else local[piece.row]).copy_(piece.values)
    return ours, theirs


def by_tedlab(model: GPT, ids: Tensor, tokens: int) -> list[list[int]]:
    """Returns the tokens that tedlab adds to each prompt."""
    steps = list(continuations(model, ids.tolist(), tokens, Sampling(0)))
    return [[step[number] or 0 for step in steps] for number in range(len(ids))]


@torch.inference_mode()
def by_transformers(model: Any, way: str, ids: Tensor, tokens: int) -> list[list[int]]:
    """Returns the tokens that transformers adds to each prompt, with experts computed in this ``way``."""
    model.set_experts_implementation(way)
    added: list[list[int]] = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)[
        :, ids.shape[1] :
    ].tolist()
    return added


def in_turns(contenders: dict[str, Contender], ids: Tensor, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Returns for each the seconds until the first token, and tokens per second after that, by its fastest rounds.

    What else the machine does only slows, and all of them, as all run in each round. A round before does not count.
    Whoever has too little memory is left out.
    """
    left = dict(contenders)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for number in range(1 + rounds):
        for name, run in list(left.items()):
            try:
                taken[name].append((_seconds(run, ids, 1), _seconds(run, ids, tokens)))
            except torch.OutOfMemoryError:
                print(f"{name} has too little memory for {len(ids)} texts", flush=True)
                del left[name]
        which = f"round {number} of {rounds}" if number else "the round that does not count"
        said = ", ".join(f"{name} {taken[name][-1][1]:.2f} s" for name in left)
        print(f"{len(ids)} texts, {which}: {said}", flush=True)
    figures = {}
    for name in left:
        first, whole = map(min, zip(*taken[name][1:], strict=True))
        figures[name] = {"first_s": first, "tokens_per_second": len(ids) * (tokens - 1) / (whole - first)}
    return figures


def _seconds(run: Contender, ids: Tensor, tokens: int) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    run(ids, tokens)  # returns numbers, for which it waits
    return time.perf_counter() - began


@torch.inference_mode()
def steps_apart(model: Any, ids: Tensor, ours: list[list[int]], theirs: list[list[int]]) -> float | None:
    """Returns how far apart two tokens are at the most by which the texts of a prompt part; None if no texts do.

    Args:
        model: Transformers'.
        ids: The prompts.
        ours: The tokens that one program added to each.
        theirs: Those that the other did.

    Returns:
        The difference of their logits by ``model``, which computes the text before them as one, in steps of its dtype.
    """
    found = []
    for prompt, a, b in zip(ids, ours, theirs, strict=True):
        if a != b:
            parting = next(place for place, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
            logits = model(torch.cat([prompt, prompt.new_tensor(a[:parting])])[None]).logits[0, -1]
            pair = logits[[a[parting], b[parting]]].double()
            step = torch.finfo(logits.dtype).eps * 2.0 ** pair.abs().max().log2().floor()
            found.append(float(pair.diff().abs() / step))
    return max(found, default=None)


def measure(
    shape: Shape, overrides: list[str], batches: list[int], lengths: tuple[int, int], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Returns a row for each batch: of both, the tokens per second after the first, and the seconds until that."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("both models get the same weights, which goes through files", flush=True)
    ours, theirs = both(shape, overrides, device, dtype)
    contenders: dict[str, Contender] = {way: partial(by_transformers, theirs, way) for way in _WAYS}
    contenders["tedlab"] = partial(by_tedlab, ours)
    prompt, tokens = lengths
    rows = []
    for batch in batches:
        draw = torch.Generator().manual_seed(batch)
        ids = torch.randint(1, ours.config.vocab_size or 0, (batch, prompt), generator=draw).to(device)
        ways = in_turns(contenders, ids, tokens, _ROUNDS)
        own = ways.pop("tedlab")
        best, figures = fastest(ways)
        added = contenders["tedlab"](ids, tokens), contenders[best](ids, tokens)
        rows.append(
            {
                "batch": batch,
                "experts": best,
                "transformers": figures,
                "tedlab": own,
                "ratio": own["tokens_per_second"] / figures["tokens_per_second"],
                "texts_alike": sum(a == b for a, b in zip(*added, strict=True)) / batch,
                "steps_apart": steps_apart(theirs, ids, *added),
                "transformers_by_experts": ways,
            }
        )
    return rows


def fastest(ways: dict[str, dict[str, float]]) -> tuple[str, dict[str, float]]:
    """Returns the name of the one that generates most tokens per second, and the best of each figure in any of them."""
    speeds = {name: figures["tokens_per_second"] for name, figures in ways.items()}
    best = max(speeds, key=speeds.__getitem__)
    return best, {"first_s": min(figures["first_s"] for figures in ways.values()), "tokens_per_second": speeds[best]}


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """For people."""
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    names = (
        "batch",
        "experts",
        "transformers, tokens/s",
        "tedlab",
        "ratio",
        "first token, ms",
        "tedlab",
        "texts alike",
    )
    for column in names:
        result.add_column(column, justify="right")
    for row in rows:
        theirs, ours = row["transformers"], row["tedlab"]
        result.add_row(
            *(f"{row['batch']}", row["experts"]),
            *(f"{theirs['tokens_per_second']:,.0f}", f"{ours['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}"),
            *(f"{1e3 * theirs['first_s']:.0f}", f"{1e3 * ours['first_s']:.0f}", f"{row['texts_alike']:.0%}"),
        )
    return result


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    shapes = [name for name in SHAPES if name != "ted_1.3b"]
    parser.add_argument("shapes", nargs="*", default=shapes, help=f"of {', '.join(shapes)} (default: all)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="texts (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to add, at least 2 (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="on a CPU, too")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the presets")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.tokens < 2:
        parser.error("--tokens must be at least 2: speed is that of the tokens after the first")
    require("transformers")
    cuda = torch.cuda.is_available()
    facts = surroundings(torch.device("cuda" if cuda else "cpu"), "transformers")
    dtype = torch.bfloat16 if cuda or arguments.bf16 else torch.float32
    lengths = arguments.prompt, arguments.tokens
    facts |= {"dtype": str(dtype).removeprefix("torch."), "prompt": arguments.prompt, "tokens": arguments.tokens}
    overrides = {name: [*(_GPU if cuda else [*_CPU, *SHAPES[name].small]), *arguments.set] for name in arguments.shapes}
    results = {}
    for name in arguments.shapes:
        results[name] = measure(SHAPES[name], overrides[name], arguments.batches, lengths, dtype)
        title = f"{name}: {facts['device']}, transformers {facts['versions']['transformers']}"
        Console(width=110).print(table(results[name], title))
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(facts | {"overrides": overrides, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
