"""A learning-rate schedule: up for the first half of what follows the warm-up, down for the second."""

from tedlab.optim import schedules


@schedules.register("guest_triangle")
def triangle(step: int, warmup_steps: int, total_steps: int, final: float, decay: float) -> float:
    """``optim.schedule=guest_triangle``: between ``final`` and 1."""
    half = max(1.0, (total_steps - warmup_steps) / 2)
    return final + (1.0 - final) * max(0.0, 1.0 - abs(step - warmup_steps - half) / half)
