"""Checks the optimizer and its schedule by building them once and stepping parameters of one element."""

import inspect
import math
import numbers
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import hydra
import torch
from torch.optim import Optimizer

from tedlab.config import TrainConfig
from tedlab.hints import did_you_mean
from tedlab.optim.fused import check_tile
from tedlab.optim.groups import Grouping
from tedlab.optim.kinds import check_kind
from tedlab.optim.schedule import WITHOUT_DECAY, schedules
from tedlab.ranges import check_ranges
from tedlab.validate.parametrization import check_parametrization, parameters_of, scales_of

_SET_BY_US = {"lr": "optim.lr", "params": "model=…"}  # arguments of every optimizer, and what sets them
_FLAGS = ("foreach", "fused")  # boolean although their default is null, with which torch chooses
_tried: set[str] = set()  # configurations that could be built and stepped
_BELOW_ONE = ("momentum", "alpha")  # torch checks at most their sign


def check_optim(config: TrainConfig) -> None:
    """Builds the optimizer and lets it take a step.

    Raises:
        ValueError: If the optimizer is invalid; the message says what would do.
    """
    optim = config.optim
    schedules[optim.schedule]  # raises if it is unknown
    steps, total = optim.decay_steps, config.trainer["max_steps"]
    if steps is not None and optim.schedule in WITHOUT_DECAY:
        raise ValueError(
            f"optim.decay_steps={steps} says in how many steps optim.schedule=wsd decays, but {optim.schedule} has no "
            "such steps; use wsd, or leave decay_steps out (null)"
        )
    if steps is not None and steps + optim.warmup_steps > total:
        raise ValueError(
            f"optim.decay_steps={steps} and optim.warmup_steps={optim.warmup_steps} are more steps than the run has, "
            f"trainer.max_steps={total}"
        )
    target = optim.optimizer.get("_target_")
    try:
        kind = hydra.utils.get_class(str(target))
    except Exception as error:  # the import can raise anything
        raise ValueError(f"optim.optimizer._target_={target} cannot be imported: {error}") from None
    if not issubclass(kind, Optimizer):
        raise ValueError(f"optim.optimizer._target_={target} is not an optimizer, but a {kind.__name__}")
    check_kind(kind, optim.optimizer)
    check_tile(optim.tile, kind, optim.optimizer)
    _check_options(kind, {name: value for name, value in optim.optimizer.items() if not name.startswith("_")})
    check_parametrization(config, kind)
    key = repr((optim, config.trainer["max_steps"], config.trainer["accelerator"]))
    if key not in _tried:  # a plan validates thousands of configurations
        _try(config)
        _tried.add(key)
    check_groups(config)


def check_groups(config: TrainConfig) -> None:
    """Checks ``optim.groups`` against the names of the model's parameters.

    Raises:
        ValueError: If a group is invalid; the message says what would do.
    """
    groups = config.optim.groups
    for number, group in enumerate(groups):
        check_ranges(group, f"optim.groups[{number}].")
    grouping = Grouping.under(config.optim, scales_of(config))
    if groups or grouping.of_matrices:
        parameters = [*parameters_of(config)]
        grouping.check(parameter.name for parameter in parameters)
        if grouping.of_matrices:
            grouping.check_adamw((p.name for p in parameters), config.optim.optimizer.get("adamw") or ())
        trained = [p for p in parameters if grouping.trains(p.name)]
        if grouping.of_matrices and not any(grouping.matrix(p.name, len(p.shape), p.decayed) for p in trained):
            options = config.optim.optimizer
            kind = str(options["_target_"]).rpartition(".")[2]
            raise ValueError(
                f"optim.optimizer.adamw={options.get('adamw')} and optim.groups leave {kind} no matrix to train; leave "
                "patterns out, or use optim=adamw"
            )


def _check_options(kind: type[Optimizer], options: Mapping[str, Any]) -> None:
    """Checks the names and numbers of an optimizer's arguments."""
    known = inspect.signature(kind).parameters
    for name, value in options.items():
        where = f"optim.optimizer.{name}"
        if name in _SET_BY_US:
            raise ValueError(f"{where}={value} is set by the run itself; use {_SET_BY_US[name]}")
        if name not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            valid = sorted(set(known) - set(_SET_BY_US))
            raise ValueError(
                f"{where}: {kind.__name__} has no such argument.{did_you_mean(name, valid)} Valid: {', '.join(valid)}"
            )
        default = known[name].default if name in known else None
        if value is not None and not isinstance(value, bool) and (isinstance(default, bool) or name in _FLAGS):
            raise ValueError(f"{where} is {value}; it must be true, false or null")
        if isinstance(value, bool) and _is_number(default):
            raise ValueError(f"{where} is {value}; it must be a number")
        for number in _numbers(value):
            if not math.isfinite(number):
                raise ValueError(f"{where} is {value}; it must be finite")
        if name in _BELOW_ONE and _is_number(value) and not 0 <= value < 1:
            raise ValueError(f"{where} is {value}; it must be at least 0 and smaller than 1")


def _try(config: TrainConfig) -> None:
    """Takes a step of a parameter of one element in each of the groups that a run has."""
    from tedlab.module import optimizer_with_schedule  # imports the model

    options = Grouping.under(config.optim, scales_of(config)).options(config.optim)
    parameters = [torch.nn.Parameter(torch.ones(1, 1)) for _ in options]
    groups = [{"params": [parameter], **its} for parameter, its in zip(parameters, options, strict=True)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer, schedule = optimizer_with_schedule(config.optim, groups, config.trainer["max_steps"])
            if config.trainer["accelerator"] == "cpu":  # do not refuse what works on GPUs only
                for parameter in parameters:
                    parameter.grad = torch.ones_like(parameter)
                optimizer.step()
                schedule.step()
    except Exception as error:  # optimizers raise anything for bad arguments
        raise ValueError(f"optim.optimizer cannot be built as configured: {_sentence(error)}") from None


def _sentence(error: Exception) -> str:
    """Returns the optimizer's own message, without the one that Hydra wraps around it."""
    cause = error.__cause__ if isinstance(error, hydra.errors.InstantiationException) and error.__cause__ else error
    return f"{type(cause).__name__}: {cause}" if isinstance(cause, (KeyError, IndexError, TypeError)) else str(cause)


def _numbers(value: object) -> Iterator[float]:
    """Yields the numbers in a value, also inside lists."""
    if _is_number(value):
        yield value  # type: ignore[misc]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _numbers(item)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
