"""tedlab and transformers side by side: the same models, batches and optimizer on one GPU.

    pip install -e '.[transformers]'
    python -m benchmarks.vs_transformers                    # all shapes
    python -m benchmarks.vs_transformers olmoe --layers 6   # one of them, with fewer blocks

See README.md for what is alike and what is not.
"""

import argparse
import json
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.steps import WARM_UP, Clock, Measured, RandomTokens, composed, free
from benchmarks.surroundings import require, surroundings
from benchmarks.train_step import attempt, table
from tedlab.config import TrainConfig
from tedlab.exchange.imports import open_folder, read_pieces
from tedlab.models import GPT
from tedlab.models.families import family_for
from tedlab.topology import Topology


@dataclass(frozen=True)
class Shape:
    """One model in both libraries.

    Attributes:
        overrides: of tedlab.
        family: transformers' ``model_type``.
        small: further overrides of the model whose logits are compared.
    """

    overrides: list[str]
    family: str
    small: tuple[str, ...] = ("model.head_dim=null", "model.kv_heads=2")


_TODAY = ["model.activation=swiglu", "model.bias=false", "model.norm=rms", "model.positions=rotary"]
_LATENT = ("kv_rank=16", "nope_dim=16", "rope_dim=8", "v_dim=16")
SHAPES = {
    "olmoe": Shape(["experiment=gpu/olmoe_1b_7b", "model.qk_norm=full"], "olmoe", ()),
    "qwen3_30b": Shape(["experiment=gpu/qwen3_30b_a3b"], "qwen3_moe"),
    "deepseek_v2_lite": Shape(
        ["experiment=gpu/deepseek_v2_lite"],
        "deepseek_v2",
        ("moe.ffn=32", *(f"model.attention.latent.{size}" for size in _LATENT)),
    ),
    # transformers has no GPT with experts; Qwen3's decoder has them in every second block. Of SwiGLU's three matrices
    # two thirds of the width are as many parameters.
    "ted_1.3b": Shape(["experiment=gpu/ted_1.3b_moe", *_TODAY, "model.ffn=5504", "model.qk_norm=head"], "qwen3_moe"),
}


def peer_model(shape: Shape, config: TrainConfig, device: torch.device) -> Any:
    """With random weights in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    described = family_for(config.model, config.moe, shape.family).write(config.model, config.moe)
    with device:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**described, use_cache=False, bos_token_id=None, eos_token_id=None, pad_token_id=None),
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
            dtype=torch.bfloat16,
        )
    return model.train()


_SMALL = ["model.layers=4", "model.hidden=64", "model.heads=4", "model.ffn=32", "model.sequence_length=64"]
_SMALL += ["model.vocab_size=512", "moe.num_experts=8", "model.compile=none", "trainer.precision=32-true"]


@torch.no_grad()
def difference(shape: Shape) -> float:
    """Between logits of both libraries for the same weights and tokens: the largest, of a small model in fp32."""
    config, device = composed([*shape.overrides, *_SMALL, *shape.small]), torch.device("cpu")
    theirs = peer_model(shape, config, device).float()
    ours = GPT(config.model, config.moe, Topology.single(device), seed=0)
    own: dict[str, Any] = dict(ours.named_parameters())
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        for piece in read_pieces(open_folder(Path(folder))):
            local = own[piece.name].detach().to_local()
            (local if piece.row is None else local[piece.row]).copy_(piece.values)
    ids = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0))
    return float((theirs(input_ids=ids).logits - ours(ids)[0]).abs().max())


def peer(shape: Shape, config: TrainConfig, steps: int) -> Measured:
    """A plain loop: forward, backward, clipping, torch's fused AdamW in bfloat16."""
    free()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = peer_model(shape, config, device)
    settings = {key: value for key, value in config.optim.optimizer.items() if key != "_target_"}
    optimizer = AdamW(model.parameters(), lr=config.optim.lr, fused=True, **settings)
    accumulated = int(config.trainer["accumulate_grad_batches"])
    clip = config.trainer["gradient_clip_val"]
    clock, batches, loss = Clock(), iter(RandomTokens(config)), torch.zeros(())
    for step in range(WARM_UP + steps):
        if step == WARM_UP and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        for _ in range(accumulated):
            ids: Tensor = next(batches)[:, :-1].to(device, non_blocking=True)
            clock.mark("data")
            loss = model(input_ids=ids, labels=ids).loss
            clock.mark("forward")
            (loss / accumulated).backward()
            clock.mark("backward")
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        clock.mark("step")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return clock.measured(steps, peak, loss.item())


def peer_row(shape: Shape, overrides: list[str], steps: int) -> dict[str, Any]:
    """With micro-batches as large as fit: half as many samples each time that memory does not suffice."""
    config = composed(overrides)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    row: dict[str, Any] = {"name": "transformers", "error": "out of memory"}
    size = config.data.micro_batch_size
    while size and "error" in row:
        given = [*overrides, f"data.micro_batch_size={size}"]
        row["name"] = f"transformers, {size} samples at a time"
        try:
            config = composed(given)
            row |= peer(shape, config, steps).summary(config, device)
            del row["error"]
        except torch.cuda.OutOfMemoryError:
            print(f"transformers: out of memory with {size} samples at a time", flush=True)
            size //= 2
        except Exception:
            row["error"] = traceback.format_exc()
            break
    free()
    print(f"{row['name']}: {row.get('error') or format(row['tokens_per_second'], ',.0f') + ' tokens/s'}", flush=True)
    return row


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vs_transformers",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), help=f"of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--layers", type=int, help="blocks (default: the preset's)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the presets")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.shapes) - SHAPES.keys())
    if unknown:
        parser.error(f"there is no shape {unknown[0]}; valid: {', '.join(SHAPES)}")
    require("transformers")
    facts = surroundings(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "transformers")
    results: dict[str, Any] = {}
    for name in arguments.shapes:
        shape, overrides = SHAPES[name], [*SHAPES[name].overrides, *arguments.set]
        if arguments.layers:
            overrides.append(f"model.layers={arguments.layers}")
        apart = difference(shape)
        print(f"{name}: with the same weights logits of a small model differ by at most {apart:.1e}", flush=True)
        rows = [peer_row(shape, overrides, arguments.steps), attempt("tedlab", overrides, arguments.steps)]
        results[name] = {"overrides": overrides, "logits_differ_by": apart, "rows": rows}
        title = f"{name}: {facts['device']}, transformers {facts['versions']['transformers']}"
        Console(width=130).print(table(rows, title))
        if not any("error" in row for row in rows):
            results[name]["ratio"] = rows[1]["tokens_per_second"] / rows[0]["tokens_per_second"]
            print(f"tedlab / transformers: {results[name]['ratio']:.2f} × the tokens per second")
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(facts | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
