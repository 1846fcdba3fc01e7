"""tedlab and transformers side by side: the same models, batches and optimizer on one GPU.

    pip install -e '.[transformers]'
    python -m benchmarks.vs_transformers                    # all shapes
    python -m benchmarks.vs_transformers olmoe --layers 6   # one of them, with fewer blocks

See README.md for what is alike and what is not.
"""

import argparse
import json
import traceback
from collections.abc import Callable
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
from tedlab.config import Gates, QKNorm, TrainConfig
from tedlab.models import GPT
from tedlab.topology import Topology


@dataclass(frozen=True)
class Shape:
    """One model in both libraries.

    Attributes:
        overrides: of tedlab.
        peer: transformers' configuration of the same model.
    """

    overrides: list[str]
    peer: Callable[[TrainConfig], Any]


def _sizes(config: TrainConfig) -> dict[str, Any]:
    model, moe = config.model, config.moe
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "max_position_embeddings": model.sequence_length,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.top_k > 1 and moe.router.gates in (None, Gates.NORMALIZED),
        "tie_word_embeddings": model.tie_embeddings,
        "rms_norm_eps": model.norm_eps,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": False,
    }


def _olmoe(config: TrainConfig) -> Any:
    from transformers import OlmoeConfig

    return OlmoeConfig(**_sizes(config))


def _qwen3(config: TrainConfig) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **_sizes(config),
        moe_intermediate_size=config.model.ffn,
        decoder_sparse_step=config.moe.every,
        head_dim=config.model.head_dim or config.model.hidden // config.model.heads,
        rope_parameters={"rope_type": "default", "rope_theta": config.model.rotary_base},
    )


_TODAY = ["model.activation=swiglu", "model.bias=false", "model.norm=rms", "model.positions=rotary"]
SHAPES = {
    "olmoe": Shape(["experiment=gpu/olmoe_1b_7b"], _olmoe),
    # transformers has no GPT with experts; Qwen3's decoder has them in every second block. Of SwiGLU's three matrices
    # two thirds of the width are as many parameters.
    "qwen3_30b": Shape(["experiment=gpu/qwen3_30b_a3b"], _qwen3),
    "ted_1.3b": Shape(["experiment=gpu/ted_1.3b_moe", *_TODAY, "model.ffn=5504"], _qwen3),
}


def peer_model(shape: Shape, config: TrainConfig, device: torch.device) -> nn.Module:
    """With random weights in bfloat16, and without norms of queries and keys unless tedlab's model has them."""
    from transformers import AutoModelForCausalLM

    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(
            shape.peer(config),
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
            dtype=torch.bfloat16,
        )
    for module in model.modules():
        for name in () if config.model.qk_norm != QKNorm.NONE else ("q_norm", "k_norm"):
            if hasattr(module, name):
                setattr(module, name, nn.Identity())
    return model.train()


_SMALL = ["model.layers=4", "model.hidden=64", "model.heads=4", "model.ffn=32", "model.sequence_length=64"]
_SMALL += ["model.vocab_size=512", "moe.num_experts=8", "model.compile=none", "trainer.precision=32-true"]


@torch.no_grad()
def difference(shape: Shape) -> float:
    """Between logits of both libraries for the same weights and tokens: the largest, of a small model in fp32."""
    config, device = composed([*shape.overrides, *_SMALL]), torch.device("cpu")
    theirs = peer_model(shape, config, device).float()
    ours = GPT(config.model, config.moe, Topology.single(device), seed=0)
    take_over(theirs.state_dict(), ours, config.model.kv_heads or config.model.heads)
    ids = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0))
    return (theirs(input_ids=ids).logits - ours(ids)[0]).abs().max().item()


def take_over(theirs: dict[str, Tensor], network: GPT, kv_heads: int) -> None:
    """Puts transformers' weights into tedlab's model; that every parameter gets one is checked."""
    own = dict(network.named_parameters())

    def put(name: str, value: Tensor) -> None:
        local: Any = own.pop(name).detach()
        local.to_local().copy_(value)

    put("embedding.weight", theirs["model.embed_tokens.weight"])
    put("norm.weight", theirs["model.norm.weight"])
    if network.output is not None:
        put("output.weight", theirs["lm_head.weight"])
    for i in range(len(network.blocks)):
        layer, block = f"model.layers.{i}.", f"blocks.{i}."
        q, k, v = (theirs[f"{layer}self_attn.{part}_proj.weight"].unflatten(0, (kv_heads, -1)) for part in "qkv")
        put(f"{block}norm1.weight", theirs[f"{layer}input_layernorm.weight"])
        put(f"{block}norm2.weight", theirs[f"{layer}post_attention_layernorm.weight"])
        if f"{block}attention.qkv.weight" in own:
            put(f"{block}attention.qkv.weight", torch.cat((q, k, v), 1).flatten(0, 1))  # head by head
        else:
            put(f"{block}attention.q.weight", q.flatten(0, 1))
            put(f"{block}attention.kv.weight", torch.cat((k, v), 1).flatten(0, 1))
        for norm in ("q_norm", "k_norm"):
            if f"{block}attention.{norm}.weight" in own:
                put(f"{block}attention.{norm}.weight", theirs[f"{layer}self_attn.{norm}.weight"])
        put(f"{block}attention.out.weight", theirs[f"{layer}self_attn.o_proj.weight"])
        if f"{layer}mlp.gate.weight" in theirs:
            halves = theirs[f"{layer}mlp.experts.gate_up_proj"].chunk(2, 1)
            put(f"{block}feed_forward.router.weight", theirs[f"{layer}mlp.gate.weight"])
            put(f"{block}feed_forward.experts.up", torch.stack(halves, 2).flatten(1, 2).mT)  # feature by feature
            put(f"{block}feed_forward.experts.down", theirs[f"{layer}mlp.experts.down_proj"].mT)
        else:
            halves = theirs[f"{layer}mlp.gate_proj.weight"], theirs[f"{layer}mlp.up_proj.weight"]
            put(f"{block}feed_forward.up.weight", torch.stack(halves, 1).flatten(0, 1))
            put(f"{block}feed_forward.down.weight", theirs[f"{layer}mlp.down_proj.weight"])
    assert not own, f"without a counterpart: {', '.join(own)}"


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
