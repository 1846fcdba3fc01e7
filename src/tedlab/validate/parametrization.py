"""Checks that the optimizer has rules for how learning rates follow the width, and says what they make of them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch.optim import AdamW, Optimizer

from tedlab.config import ModelConfig, TrainConfig
from tedlab.models import models
from tedlab.optim.groups import Grouping
from tedlab.optim.muon import Muon
from tedlab.optim.narrow import NarrowAdamW
from tedlab.parametrization import STANDARD, Scale, scales
from tedlab.spec import ParameterSpec

_WITH_RULES = (AdamW, NarrowAdamW, Muon)


def scales_of(config: TrainConfig) -> Mapping[str, Scale]:
    """Returns the scales of a configuration's parameters, see :func:`tedlab.parametrization.scales`."""
    model = _named(config)
    return scales(models[model.architecture].spec, model, config.moe)


def parameters_of(config: TrainConfig) -> Iterator[ParameterSpec]:
    """Returns the parameters of a configuration; their names do not depend on a vocabulary that is not known yet."""
    model = _named(config)
    return models[model.architecture].spec(model, config.moe).parameters()


def _named(config: TrainConfig) -> ModelConfig:
    return replace(config.model, vocab_size=config.model.vocab_size or 1)


def check_parametrization(config: TrainConfig, optimizer: type[Optimizer]) -> None:
    """Checks the parametrization of the model with an optimizer.

    Raises:
        ValueError: If it is invalid; the message says what would do.
    """
    found, model = scales_of(config), config.model
    if model.parametrization == STANDARD:
        return
    if optimizer not in _WITH_RULES:
        raise ValueError(
            f"model.parametrization={model.parametrization} has no rule for {optimizer.__name__}: how a learning rate "
            "follows the width depends on how updates follow gradients. Use optim=adamw or optim=muon, or "
            f"model.parametrization={STANDARD}"
        )
    grouping = Grouping.under(config.optim, found)
    for p in parameters_of(config):
        if p.fan_in is None and grouping.matrix(p.name, len(p.shape), p.decayed):
            raise ValueError(
                f"{optimizer.__name__} would step {p.name}, which is a table and no matrix of a product, so that "
                f"model.parametrization={model.parametrization} has no rule for it; leave it to AdamW, by a pattern in "
                "optim.optimizer.adamw"
            )


def parametrization_notes(config: TrainConfig) -> list[str]:
    """Returns a note on what a parametrization makes of the learning rate, and of how many parameters."""
    if config.model.parametrization == STANDARD:
        return []
    grouping = Grouping.under(config.optim, scales_of(config))
    counts = Counter(grouping.factor(p.name, len(p.shape), p.decayed) for p in parameters_of(config))
    rates = ", ".join(f"{count} × {factor:.4g}" for factor, count in sorted(counts.items(), reverse=True))
    return [
        f"model.parametrization={config.model.parametrization}, from model.base_hidden={config.model.base_hidden} to "
        f"model.hidden={config.model.hidden}: factors on the learning rates of parameters are {rates}."
    ]
