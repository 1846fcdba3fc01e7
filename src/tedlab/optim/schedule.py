"""Learning-rate schedules that follow a linear warm-up."""

import math
from collections.abc import Callable
from typing import Protocol

from tedlab.config import OptimConfig
from tedlab.registry import Registry


class Schedule(Protocol):
    """Computes the factor on the learning rate after the warm-up."""

    def __call__(self, step: int, warmup_steps: int, total_steps: int, final: float, decay: float) -> float:
        """Returns the factor at a step.

        Args:
            step: Step, at least ``warmup_steps``.
            warmup_steps: Number of steps of the warm-up.
            total_steps: Number of steps of the run.
            final: The configuration's ``optim.final_lr_fraction``.
            decay: Share of the run in which it decays, from ``optim.decay_fraction`` or ``optim.decay_steps``.
        """
        ...


schedules: Registry[Schedule] = Registry("optim.schedule")
WITHOUT_DECAY = ("cosine", "constant")  # schedules that do not ask in how many steps they are to decay


@schedules.register("cosine")
def _cosine(step: int, warmup_steps: int, total_steps: int, final: float, decay: float) -> float:
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


@schedules.register("constant")
def _constant(step: int, warmup_steps: int, total_steps: int, final: float, decay: float) -> float:
    return 1.0


@schedules.register("wsd")
def _stable_then_linear(step: int, warmup_steps: int, total_steps: int, final: float, decay: float) -> float:
    left = max(0.0, (total_steps - step) / max(1.0, decay * total_steps))
    return final + (1.0 - final) * min(1.0, left)


def schedule_of(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Returns the configured factor on the learning rate, see :func:`learning_rate_schedule`."""
    decay = config.decay_fraction if config.decay_steps is None else config.decay_steps / max(1, total_steps)
    return learning_rate_schedule(config.schedule, config.warmup_steps, total_steps, config.final_lr_fraction, decay)


def learning_rate_schedule(
    name: str, warmup_steps: int, total_steps: int, final_fraction: float, decay_fraction: float = 0.2
) -> Callable[[int], float]:
    """Returns the factor on the learning rate at each step, for ``torch.optim.lr_scheduler.LambdaLR``.

    Args:
        name: Schedule after the warm-up: ``cosine`` (to ``final_fraction`` at ``total_steps``), ``constant``, ``wsd``
            (warm-up, stable, decay: constant, then linear to ``final_fraction``), or a registered one.
        warmup_steps: Number of steps until the factor is 1; in the first step it is already above 0.
        total_steps: Number of steps of the run.
        final_fraction: The last factor of ``cosine`` and ``wsd``.
        decay_fraction: Share of the run in which ``wsd`` decays.
    """
    schedule = schedules[name]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return schedule(step, warmup_steps, total_steps, final_fraction, decay_fraction)

    return factor
