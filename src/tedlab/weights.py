"""Starts a run from the weights of an imported model or of another run, with an optimizer that has seen nothing yet.

The weights decide what the model is: every value of ``model`` and ``moe`` is that of their checkpoint, unless the
command line or its experiment names it, or it says how to compute and not what.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from torch import nn

from tedlab.checkpoint import load_weights, stored_tensors
from tedlab.config import ModelConfig, MoEConfig, TrainConfig, with_values
from tedlab.data.tokenizers import SAVED
from tedlab.errors import UsageError
from tedlab.models import models
from tedlab.models.families.family import flat
from tedlab.opened import model_of
from tedlab.resume import find_checkpoint, is_named

PREFIX = "model.network."  # of a model's parameters in a checkpoint
_BALANCING = ".router.bias"  # no parameter, and may be left out
# How a model is computed, and not what it is.
_HOW = (
    *("model.compile", "model.recompute", "model.loss_chunk", "model.init_std"),
    *("moe.kernel", "moe.lend", "moe.slice", "moe.capacity_groups"),
)


def start_from(config: TrainConfig, named: Collection[str]) -> tuple[TrainConfig, list[str]]:
    """Sets the model that ``weights`` are of, and their tokenizer.

    Args:
        config: The composed configuration.
        named: The names from :func:`tedlab.resume.named_values`.

    Returns:
        The resulting configuration, and sentences to print about it, which a run without ``weights`` does not have.

    Raises:
        UsageError: If there are no such weights, or they do not fit the values that are named.
    """
    if config.weights is None:
        return config, []
    try:
        path = find_checkpoint(Path(config.weights), "weights")
        model, moe = model_of(path)
        values = {
            name: value
            for name, value in flat(model, moe).items()
            if not is_named(name, _HOW) and not is_named(name, named)
        }
        tokenizer = path.absolute().parents[1] / SAVED
        if tokenizer.is_file() and not is_named("data.tokenizer", named):
            values["data.tokenizer"] = str(tokenizer)
        config = with_values(replace(config, weights=str(path)), values)
        _check_shapes(path, config.model, config.moe)
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}") from None
    blocks = "1 block" if config.model.layers == 1 else f"{config.model.layers} blocks"
    what = "Starting from the weights of"
    if config.ckpt_path is not None or config.resume is not None:  # a run that goes on has weights of its own by now
        what = "A new run starts from the weights of, and one that goes on is of the model of"
    return config, [f"{what} {path}: {blocks} of {config.model.hidden} features."]


def load_into(module: nn.Module, path: Path) -> None:
    """Loads the weights of a checkpoint into a model that is sharded under any layout. Collective.

    Biases that balance choices, which are no parameters, begin at 0 if the checkpoint has none, and are left out if the
    model has none.

    Raises:
        FileNotFoundError: If ``path`` is not a complete checkpoint.
        ValueError: If the checkpoint is of another model, or damaged.
    """
    stored = stored_tensors(path)
    absent = [name for name, _ in module.named_parameters() if f"model.{name}" not in stored]
    if absent:
        raise ValueError(f"{path} is of another model: it lacks {', '.join(absent[:3])}")
    load_weights(module, path, strict=False)


def _check_shapes(path: Path, model: ModelConfig, moe: MoEConfig) -> None:
    """Refuses a model whose parameters are not those of the checkpoint."""
    there = {n.removeprefix(PREFIX): tuple(t.size) for n, t in stored_tensors(path).items() if n.startswith(PREFIX)}
    here = {p.name: tuple(p.shape) for p in models[model.architecture].spec(model, moe).parameters()}
    unused = [name for name in there if name not in here and not name.endswith(_BALANCING)]
    if unused:
        raise ValueError(
            f"{path} has {unused[0]}, and a model with what is named here has not: leave values of the model out, "
            "weights have their own"
        )
    for name, shape in here.items():
        if there.get(name) != shape:
            raise ValueError(
                f"{name} has the shape {there.get(name, 'of none')} in {path}, and {shape} with what is named here: "
                "leave values of the model out, weights have their own"
            )
