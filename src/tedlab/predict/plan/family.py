"""Makes base models of any size by interpolating GPT-3's table, and finds the largest that fits a cluster."""

from collections.abc import Callable
from dataclasses import replace
from math import prod

from tedlab.config import TrainConfig
from tedlab.models import models
from tedlab.nn import with_heads

_HEAD = 128  # features of an attention head, at most
_GPT3 = ((768, 12), (1024, 24), (2048, 24), (2560, 32), (4096, 32), (5120, 40), (12288, 96))  # width, layers
_WIDEST, _STEP = 65_536, 64


def member(config: TrainConfig, width: int, tensor: int = 1) -> TrainConfig:
    """Returns a copy of ``config`` with a base model of about this width, whose heads the tensor degree divides.

    The number of layers is interpolated between GPT-3's models (Brown et al., 2020, table 2.1), and even because every
    second layer has experts. Heads have up to 128 features, a multiple of 8. Feed-forward layers are four times wider;
    experts with a width of their own keep its ratio to that of the model.
    """
    heads = tensor * max(1, -(-width // (_HEAD * tensor)))
    model = with_heads(config.model, heads, max(8, width // heads // 8 * 8), tensor)
    hidden = model.hidden
    below = max((row for row in _GPT3 if row[0] <= hidden), default=_GPT3[0])
    above = min((row for row in _GPT3 if row[0] >= hidden), default=_GPT3[-1])
    share = 0.0 if above[0] == below[0] else (hidden - below[0]) / (above[0] - below[0])
    layers = 2 * round((below[1] + share * (above[1] - below[1])) / 2)

    def scaled(ffn: int | None) -> int | None:
        return ffn and tensor * max(1, round(ffn * hidden / (config.model.hidden * tensor)))

    moe = config.moe
    moe = replace(moe, ffn=scaled(moe.ffn), shared=replace(moe.shared, ffn=scaled(moe.shared.ffn)))
    return replace(config, model=replace(model, layers=layers, ffn=4 * hidden), moe=moe)


def largest(config: TrainConfig, tensor: int, fits: Callable[[TrainConfig], bool]) -> TrainConfig | None:
    """Returns the widest member that fits, to within 64 features, or None if none does.

    Args:
        config: The configuration whose model is replaced.
        tensor: The tensor degree, which divides the heads.
        fits: Whether a configuration fits; if one does, so do all narrower ones.
    """
    low, high = 0, _WIDEST // _STEP  # the widest is in between
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(member(config, middle * _STEP, tensor)) else (low, middle - 1)
    return member(config, low * _STEP, tensor) if low else None


def parameters(config: TrainConfig) -> int:
    """Returns the number of parameters of the model."""
    model = replace(config.model, vocab_size=config.model.vocab_size or 50_304)
    return sum(prod(p.shape) for p in models[model.architecture].spec(model, config.moe).parameters())


def base_parameters(config: TrainConfig) -> int:
    """Returns the number of parameters of the base model, which has no experts."""
    return parameters(replace(config, moe=replace(config.moe, num_experts=0)))
