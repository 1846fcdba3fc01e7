"""Learning-rate schedules."""

import math
from collections.abc import Callable

from tedlab.config import Schedule


def learning_rate_schedule(
    name: str, warmup_steps: int, total_steps: int, final_fraction: float, decay_fraction: float = 0.2
) -> Callable[[int], float]:
    """The factor on the learning rate at each step, for ``torch.optim.lr_scheduler.LambdaLR``.

    Args:
        name: after a linear warm-up ``cosine`` (to ``final_fraction`` at ``total_steps``), ``constant``, or ``wsd``
            (warm-up, stable, decay: constant, then linear to ``final_fraction``).
        warmup_steps: steps until the factor is 1; the first step already moves.
        total_steps: length of the run.
        final_fraction: the last factor of ``cosine`` and ``wsd``.
        decay_fraction: share of the run that ``wsd`` decays in.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if name == Schedule.CONSTANT:
            return 1.0
        if name == Schedule.WSD:
            left = max(0.0, (total_steps - step) / max(1.0, decay_fraction * total_steps))
            return final_fraction + (1.0 - final_fraction) * min(1.0, left)
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor
