"""AdamW with moments in bf16."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tedlab.optim.rounding import Rounding, random_bits, to_bf16


class NarrowAdamW(Optimizer):
    """``torch.optim.AdamW`` whose two moments take two bytes each between steps.

    A step computes in the precision of the parameters (or of their fp32 master copies), with moments that are rounded
    only when they are kept: so the first step is AdamW's own. Rounding to the nearest number of bf16 loses what a step
    changes in a second moment if that is less than half a unit in the last place, as with β₂ = 0.999; stochastic
    rounding keeps it on average. It draws by the numbers of elements, so all layouts round alike (``rounding.py``).

    Args:
        params: Parameters, or groups of them.
        lr, betas, eps, weight_decay: AdamW's.
        rounding: ``stochastic`` or ``nearest``.
        seed: Seed of stochastic rounding; non-negative.

    Attributes:
        numbers: Returns the number of each element of a parameter, in the whole model; int64 like the parameter,
            flat. TEDStrategy sets it; None: parameters are numbered in the order of the groups.

    Raises:
        ValueError: If an argument is out of range.
    """

    elementwise = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        rounding: str = Rounding.STOCHASTIC.value,
        seed: int = 0,
    ) -> None:
        if isinstance(betas, str) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"NarrowAdamW: betas is {betas}; it must be two numbers from 0 to below 1")
        for what, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
            if not value >= 0:
                raise ValueError(f"NarrowAdamW: {what} is {value}; it must be at least 0")
        if rounding not in list(Rounding):
            raise ValueError(f"NarrowAdamW: rounding is {rounding}; valid: {', '.join(Rounding)}")
        if type(seed) is not int or seed < 0:
            raise ValueError(f"NarrowAdamW: seed is {seed}; it must be a whole number of at least 0")
        self.numbers: Callable[[Tensor], Tensor] | None = None
        options = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "rounding": rounding, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Makes a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group, first)
                first += p.numel()
        return loss

    def _step(self, p: Tensor, gradient: Tensor, group: dict[str, Any], first: int) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(p, dtype=torch.bfloat16)
        state["step"] += 1
        step = int(state["step"])
        mean = state["exp_avg"].to(p.dtype).lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].to(p.dtype).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        root = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        p.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))
        bits: tuple[Tensor | None, Tensor | None] = (None, None)
        if group["rounding"] == Rounding.STOCHASTIC:
            flat = torch.arange(first, first + p.numel(), device=p.device) if self.numbers is None else self.numbers(p)
            one, two = random_bits(flat, step, group["seed"])
            bits = one.view(p.shape), two.view(p.shape)
        state["exp_avg"].copy_(to_bf16(mean, bits[0]))
        state["exp_avg_sq"].copy_(to_bf16(square, bits[1]))
