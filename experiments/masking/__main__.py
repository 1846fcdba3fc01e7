"""``python -m experiments.masking``: see README.md."""

import ast
import json
import sysconfig
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from experiments.paper import write_json
from experiments.sweeps import draw, spread, swept
from tedlab.config import EvalConfig
from tedlab.evaluation.scoring import scores
from tedlab.evaluation.windows import Window
from tedlab.opened import load, opened

HERE = Path(__file__).parent
RUNS = Path("runs/masking")
DOCUMENTS, PACKINGS = ("packed", "masked"), ("concatenate", "best_fit")
LENGTH, JUDGED = 256, 400  # tokens of a sample; documents that validate
GIVEN = (
    *("model=gpt_tiny", "moe=top2", "parallel=single", "logger=none", "experiment_name=masking"),
    *("model.layers=4", "model.hidden=64", "model.ffn=128", f"model.sequence_length={LENGTH}"),
    # Without a capacity, which documents of a batch would share.
    *("moe.num_experts=8", "moe.every=1", "moe.dispatch=dropless"),
    *("data=text", "data.batch_size=8", "data.micro_batch_size=8", "data.validation_samples=8"),
    *("trainer.max_steps=300", "trainer.log_every_n_steps=10", "checkpoint.every=null", "validate_every=300"),
)


def main() -> None:
    """The command. Runs that have finished are kept."""
    documents = docstrings()
    held_out = documents[:: len(documents) // JUDGED][:JUDGED]
    texts = RUNS / "docstrings.jsonl"
    texts.parent.mkdir(parents=True, exist_ok=True)
    learned = sorted({*documents} - {*held_out})
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in learned))
    results: dict[str, Any] = {"documents": len(learned), "bytes": sum(len(text.encode()) for text in learned)}
    same = {
        f"{seen}, {packing}": swept(
            RUNS / f"{seen}_{packing}",
            (*GIVEN, f"data.path={texts}", f"data.documents={seen}", f"data.packing={packing}"),
        )
        for seen, packing in product(DOCUMENTS, PACKINGS)
    }
    for name, its in same.items():
        results[name] = {"loss": [judged(run, held_out, name.startswith("masked")) for run in its]}
    write_json(HERE / "results.json", results)
    draw(HERE / "loss.png", same)
    shown = Table("documents, packing", "loss of documents apart, nats")
    for name in same:
        shown.add_row(name, spread(results[name]["loss"]))
    Console().print(shown)


def docstrings() -> list[str]:
    """Returns the docstrings of Python's standard library, each once, in order: short documents."""
    found = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
                found.add(text)
    return sorted(found)


def judged(run: Path, documents: list[str], masked: bool) -> float:
    """Returns the mean loss over tokens of documents, each by itself, but the first, which masks do not learn."""
    given = opened(run / "checkpoints" / "last.ckpt", run, EvalConfig(run=str(run)))
    model, tokenizer = load(given), given.tokenizer
    separator = tokenizer.separator
    model.separator = separator if masked else None
    windows = []
    for text in documents:
        tokens = tokenizer.encode(text)[: LENGTH - 1]
        windows.append(Window(np.array([separator, *tokens, separator]), len(tokens)))
    found = scores(model, windows, batch=32)
    return -sum(score.log_likelihood for score in found) / sum(score.tokens for score in found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
