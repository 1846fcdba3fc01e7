"""An optimizer: momentum, of which large entries step by their sign and small ones in proportion."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class SoftSignSGD(Optimizer):
    """``optim.optimizer._target_=guest_package.optimizer.SoftSignSGD``: steps by m / (abs(m) + softness).

    A sign itself (softness 0) could not be certified: where a gradient is 0 but for rounding, any layout steps its way.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: share of the momentum m that is kept.
        weight_decay: decoupled.
        softness: the size of a momentum that steps half of ``lr``.
    """

    elementwise = True  # each element from its own gradient and state: ZeRO and tiles may cut it anywhere

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        softness: float = 1e-3,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "softness": softness}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                soft_sign = momentum / (momentum.abs() + group["softness"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(soft_sign, alpha=-group["lr"])
        return loss
