"""Checks that loggers and callbacks are classes that can be imported, and that they have the given arguments."""

import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import hydra
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from tedlab.config import TrainConfig
from tedlab.hints import did_you_mean

_OF_WANDB = (
    "entity",
    "group",
    "job_type",
    "mode",
    "notes",
    "resume",
    "tags",
)  # known here because importing wandb takes a second
_WANDB_MODES = ("online", "offline", "disabled", "shared")


def check_loggers(config: TrainConfig) -> None:
    """Checks ``logger`` without building anything, because W&B would start a process.

    Raises:
        ValueError: If a logger is invalid; the message says what would do.
    """
    for name, settings in config.logger.items():
        kind = _class(f"logger.{name}", settings, Logger, "logger")
        _check_arguments(f"logger.{name}", kind, settings)
        if issubclass(kind, WandbLogger) and settings.get("mode") not in (None, *_WANDB_MODES):
            valid = ", ".join(_WANDB_MODES)
            raise ValueError(f"logger.{name}.mode={settings['mode']} is unknown; valid: {valid}")
        if issubclass(kind, TensorBoardLogger) and not (find_spec("tensorboard") or find_spec("tensorboardX")):
            raise ValueError(f"logger.{name} needs a package that is not installed: pip install 'tedlab[tensorboard]'")


def check_callbacks(config: TrainConfig) -> None:
    """Checks ``callbacks`` without building anything.

    Raises:
        ValueError: If a callback is invalid; the message says what would do.
    """
    for name, settings in config.callbacks.items():
        _check_arguments(f"callbacks.{name}", _class(f"callbacks.{name}", settings, Callback, "callback"), settings)


def _class(key: str, settings: Any, base: type[Any], what: str) -> type[Any]:
    if not isinstance(settings, Mapping) or "_target_" not in settings:
        raise ValueError(f"{key}={settings} is no {what}: give it a class with {key}._target_=…")
    target = settings["_target_"]
    try:
        kind = hydra.utils.get_class(str(target))
    except Exception as error:  # the import can raise anything
        raise ValueError(f"{key}._target_={target} cannot be imported: {error}") from None
    if not issubclass(kind, base):
        raise ValueError(f"{key}._target_={target} is not a {what} of Lightning, but a {kind.__name__}")
    return kind


def _check_arguments(key: str, kind: type[Any], settings: Mapping[str, Any]) -> None:
    known = dict(inspect.signature(kind).parameters)
    if issubclass(kind, WandbLogger):  # it passes others on to wandb.init
        known |= inspect.signature(WandbLogger).parameters
        if {name for name in settings if not name.startswith("_")} <= {*known, *_OF_WANDB}:
            return
        import wandb

        known |= inspect.signature(wandb.init).parameters
    elif any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    for argument in settings:
        if argument not in known and not argument.startswith("_"):  # those are Hydra's own
            raise ValueError(f"{key}.{argument}: {kind.__name__} has no such argument.{did_you_mean(argument, known)}")
