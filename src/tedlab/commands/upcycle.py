"""``tedlab checkpoint upcycle``: reads its command line, and says what was made."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from tedlab.cli import CONF, check_overrides
from tedlab.config import ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from tedlab.degrees import parallel_degrees
from tedlab.errors import UsageError
from tedlab.exchange.upcycle import Recipe, upcycle
from tedlab.opened import model_of
from tedlab.ranges import check_ranges, number_fields
from tedlab.validate.experts import check_experts

OPTIONS = ("scale", "noise", "reinit", "router_std", "seed")


def run(source: Path, out: Path, given: Mapping[str, str], overrides: Sequence[str]) -> str:
    """Upcycles a checkpoint, and returns sentences to print.

    Args:
        source: The dense checkpoint.
        out: The run directory to make.
        given: Values of :data:`OPTIONS`.
        overrides: ``moe=PRESET`` and ``moe.…=``, as of ``tedlab train``.

    Raises:
        OSError: If it cannot be read or written.
        ValueError: If it cannot be made; the message says why.
    """
    done = upcycle(source, out, mixture(overrides, model_of(source)[0]), recipe(given))
    copies = f"{done.groups} copies of the dense layer"
    if done.pieces > 1:
        copies += f", each in {done.pieces} pieces"
    as_dense = (
        "It computes what the dense model does, but for tokens that full experts drop"
        if done.exact
        else "It does not begin as exactly the dense model, see docs/models.md"
    )
    return (
        f"{out}: {done.parameters:,} parameters; each layer of experts is {copies}, scaled by {done.scale:g}.\n"
        f"{as_dense}.\ntedlab train weights={out} …  starts from it"
    )


def recipe(given: Mapping[str, str]) -> Recipe:
    """Returns the recipe that a command line gives."""
    ranges = {number.name: number.range for number in number_fields(Recipe)}
    values: dict[str, Any] = {
        name: ranges[name].parse(name, text) if name in ranges else text for name, text in given.items()
    }
    return Recipe(**values)


def mixture(overrides: Sequence[str], model: ModelConfig) -> MoEConfig:
    """Composes the experts' configuration, and checks it for a model."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not (key == "moe" or key.startswith("moe.")):
            raise ValueError(
                f"{override!r}: tedlab checkpoint upcycle takes run, out, {', '.join(OPTIONS)}, checkpoint, "
                "moe=PRESET and moe.…, each as KEY=VALUE; everything else of the model stays as it is"
            )
    if not any(override.startswith("moe=") for override in overrides):
        raise ValueError("tedlab checkpoint upcycle needs moe=PRESET, such as moe=mixtral; moe.…= changes its values")
    try:
        check_overrides([*overrides])
        fixed = ["parallel=single", "logger=none", "output_dir=unused", "choices={}"]
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = OmegaConf.to_object(hydra.compose("train", overrides=[*fixed, *overrides]))
    except UsageError as error:
        raise ValueError(str(error)) from None
    assert isinstance(config, TrainConfig)
    check_ranges(config.moe, "moe.")
    check_experts(replace(config, model=model), parallel_degrees(ParallelConfig(1)))
    return config.moe
