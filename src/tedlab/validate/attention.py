"""Checks what attention and rotary positions must satisfy together; their layers check how heads divide."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields

import torch

from tedlab.config import ModelConfig, Positions, QKNorm, RotaryConfig, RotaryScaling, TrainConfig
from tedlab.models import models
from tedlab.nn import LatentAttentionSpec, SelfAttentionSpec

_NEEDED = (RotaryScaling.NTK, RotaryScaling.YARN, RotaryScaling.LLAMA3)  # scalings of texts of a certain length
_PATHS = {
    "sdpa": "scaled_dot_product_attention",
    "flex": "flex_attention (compiled)",
    "blocks": "tedlab's own operation, a few queries at a time",
}
_OF = {  # the scaling that a field belongs to
    **dict.fromkeys(
        ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"), RotaryScaling.YARN
    ),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), RotaryScaling.LLAMA3),
}


def attention_notes(config: TrainConfig) -> list[str]:
    """Returns how attention is computed, where it is not torch's fused kernel in all blocks."""
    spec = models[config.model.architecture].spec(config.model, config.moe)
    device = "cuda" if config.trainer.get("accelerator") != "cpu" and torch.cuda.is_available() else "cpu"
    dtype = torch.float64 if str(config.trainer.get("precision")).startswith("64") else torch.float32
    layers = (getattr(block, "attention", None) for block in spec.blocks)  # a package's blocks may have none
    known = (layer for layer in layers if isinstance(layer, SelfAttentionSpec | LatentAttentionSpec))
    paths = Counter(layer.path(device, dtype, config.model.sequence_length) for layer in known)
    if set(paths) <= {"sdpa"}:
        return []
    return [f"Attention: {', '.join(f'{count} blocks by {_PATHS[path]}' for path, count in paths.items())}."]


def check_attention(model: ModelConfig) -> None:
    """Checks ``model.attention`` and ``model.rotary``.

    Raises:
        ValueError: If fields contradict each other, or one would have no effect; the message says what would do.
    """
    for error in (*_window(model), *_rotary(model), *_latent(model)):
        raise ValueError(error)


def _window(model: ModelConfig) -> Iterator[str]:
    attention = model.attention
    if attention.full_every is not None and attention.window is None:
        yield (
            f"model.attention.full_every is {attention.full_every}, but without model.attention.window every block "
            "attends to all tokens; set a window, or leave full_every out"
        )


def _rotary(model: ModelConfig) -> Iterator[str]:
    rotary, plain = model.rotary, RotaryConfig()
    scaling = RotaryScaling(rotary.scaling)
    if model.positions != Positions.ROTARY and rotary != plain:
        yield f"model.rotary is set, but model.positions={model.positions}; it belongs to model.positions=rotary"
    if scaling in _NEEDED and rotary.original_length is None:
        yield (
            f"model.rotary.scaling={scaling} needs model.rotary.original_length, the number of tokens of the texts "
            "that the model was first trained on"
        )
    allowed = {"scaling", *(() if scaling == RotaryScaling.NONE else ("factor",))}
    allowed |= {"original_length"} if scaling in _NEEDED else set()
    allowed |= {name for name, of in _OF.items() if of == scaling}
    for name in (f.name for f in fields(RotaryConfig)):
        if name not in allowed and getattr(rotary, name) != getattr(plain, name):
            with_it = [_OF[name]] if name in _OF else _NEEDED if name == "original_length" else list(RotaryScaling)[1:]
            yield (
                f"model.rotary.{name} is {getattr(rotary, name)}, which model.rotary.scaling={scaling} does not use; "
                f"it belongs to {', '.join(with_it)}"
            )
    width = model.attention.latent.rope_dim if model.attention.latent.kv_rank else model.head_dim
    if scaling == RotaryScaling.NTK and (width or model.hidden // model.heads) == 2:
        yield "model.rotary.scaling=ntk needs heads of more than two features that turn: there is no slower pair"
    for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        least, most = getattr(rotary, low), getattr(rotary, high)
        if least >= most:
            yield f"model.rotary.{low} ({least}) must be smaller than model.rotary.{high} ({most})"


def _latent(model: ModelConfig) -> Iterator[str]:
    latent, attention = model.attention.latent, model.attention
    if latent.kv_rank is None:
        if latent.q_rank is not None:
            yield (
                f"model.attention.latent.q_rank is {latent.q_rank}, but queries are compressed only together with keys "
                "and values: set model.attention.latent.kv_rank"
            )
        return
    if model.positions != Positions.ROTARY:
        yield f"latent attention (model.attention.latent.kv_rank) needs model.positions=rotary, not {model.positions}"
    if latent.rope_dim % 2:
        yield f"model.attention.latent.rope_dim ({latent.rope_dim}) must be even: positions turn pairs of features"
    others = {
        "model.kv_heads": model.kv_heads is not None,
        "model.head_dim": model.head_dim is not None,
        "model.qk_norm": model.qk_norm != QKNorm.NONE,
        "model.attention.window": attention.window is not None,
        "model.attention.sinks": attention.sinks,
    }
    for name, given in others.items():
        if given:
            yield (
                f"{name} does not apply to latent attention (model.attention.latent.kv_rank), whose heads have their "
                "own sizes and norms; leave one of them out"
            )
