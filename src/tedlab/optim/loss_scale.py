"""Dynamic loss scaling for fp16 (Micikevicius et al., 2018)."""

from typing import Any

SMALLEST = 1.0  # an overflow at this scale has another cause


class LossScaler:
    """The factor that keeps fp16 gradients representable. An overflow halves it; it doubles after a while without one.

    Whether a step overflowed must be decided from the gradient of the whole model, so that all processes scale alike.

    Args:
        scale: Initial factor.
        growth_interval: Number of steps without overflow after which the factor doubles.
    """

    def __init__(self, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.scale = scale
        self.growth_interval = growth_interval
        self.good_steps = 0
        self.skipped_steps = 0

    def update(self, overflow: bool) -> None:
        """Adapts the scale after a step."""
        if overflow:
            self.scale = max(SMALLEST, self.scale / 2)
            self.good_steps = 0
            self.skipped_steps += 1
            return
        self.good_steps += 1
        if self.good_steps % self.growth_interval == 0:
            self.scale *= 2

    def state_dict(self) -> dict[str, Any]:
        """Returns everything but the constructor's arguments."""
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.scale, self.good_steps, self.skipped_steps = (
            state["scale"],
            state["good_steps"],
            state["skipped_steps"],
        )
