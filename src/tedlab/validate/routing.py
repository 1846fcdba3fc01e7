"""Checks the record and the replay of routing."""

from pathlib import Path

from tedlab.config import Compiler, TrainConfig
from tedlab.moe import routers
from tedlab.record import Recording, Shape, record_in


def check_routing(config: TrainConfig) -> None:
    """Checks that a run can record its routing, or replay a record.

    Raises:
        ValueError: If it cannot; the message says what would do.
    """
    asked = config.routing
    if not asked.record and asked.replay is None:
        return
    name = "routing.record=true" if asked.record else f"routing.replay={asked.replay}"
    if not config.moe.num_experts:
        raise ValueError(f"{name} is about experts, of which moe.num_experts=0 has none")
    if "replay" not in routers[config.moe.gating].supports:
        able = ", ".join(gating for gating in routers.names if "replay" in routers[gating].supports)
        raise ValueError(f"{name} needs a router whose tokens choose experts: moe.gating from {able}")
    if config.moe.inputs > 1:
        raise ValueError(
            f"{name} is about the experts of each token, and with moe.shortcut={config.moe.shortcut} a token is routed "
            "twice; use another moe.shortcut"
        )
    if config.model.compile != Compiler.NONE:
        raise ValueError(f"{name} needs model.compile=none, not {config.model.compile}")


def check_replay(config: TrainConfig, taken: int) -> None:
    """Checks that a record has the choices that a run replays.

    Args:
        config: The configuration.
        taken: The number of steps that the checkpoint it resumes from has taken.

    Raises:
        ValueError: If the record is damaged, of another shape, or lacks steps.
    """
    if config.routing.replay is None:
        return
    record, shape = Recording(record_in(Path(config.routing.replay))), Shape.of(config)
    names = {"blocks": "blocks with experts", "experts": "experts", "top_k": "top_k", "tokens": "tokens per step"}
    differences = [
        f"{text}: {getattr(record.shape, field)} in the record, {getattr(shape, field)} here"
        for field, text in names.items()
        if getattr(record.shape, field) != getattr(shape, field)
    ]
    if differences:
        raise ValueError(f"routing.replay={config.routing.replay} is of another shape: {'; '.join(differences)}")
    missing = sorted(set(range(taken + 1, config.trainer["max_steps"] + 1)) - set(record.steps))
    if missing:
        has = f"steps {record.steps[0]} to {record.steps[-1]}" if record.steps else "no step"
        raise ValueError(
            f"routing.replay={config.routing.replay} has {has}, and this run needs {missing[0]} to "
            f"{config.trainer['max_steps']}; set trainer.max_steps accordingly, or record a longer run"
        )
