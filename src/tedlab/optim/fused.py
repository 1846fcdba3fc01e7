"""Adam and AdamW in one pass over memory (``tile=fused``), without a temporary that grows with the model.

The tiled step (paper §4.2) bounds the temporaries of torch's optimizers; this step has none to bound. Each element of
gradient, master copy and moments is read once and written once, and the half-precision parameter is written with them.
"""

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from tedlab._compat.torch import fused_adam

Kernel = Callable[[Tensor, Tensor, Mapping[str, Any], Mapping[str, Any], float, Tensor | None], None]
TILE = 1_800_000  # elements that the paper updates at a time
_OLDEST = 7, 0  # compute capability for which Triton compiles
_TILE = 1 << 18  # elements: 5 MiB with moments and master copy, which fits a cache and is enough work for threads


def check_tile(tile: int | str | None, optimizer: type[Optimizer], options: Mapping[str, Any]) -> None:
    """Checks that an optimizer can be stepped with this ``tile``.

    Args:
        tile: See :class:`tedlab.optim.ShardedOptimizer`.
        optimizer: Exact class of the optimizer, since nothing is known of what a subclass computes.
        options: Arguments of its constructor, or one of its parameter groups.

    Raises:
        ValueError: If it cannot; the message says what would work.
    """
    if tile == "fused":
        reason = _unfit(optimizer, options)
        if reason is not None:
            raise ValueError(f"tile=fused {reason}, or use a number of elements, null, or auto")
    elif tile not in (None, "auto") and (type(tile) is not int or tile < 1):
        # The configuration accepts any value: OmegaConf 2.3 cannot merge a union below a section that is missing.
        raise ValueError(
            f"tile={tile} is not valid: a number of elements (at least 1), null for no tiles, fused, or auto for the "
            "fastest that the device and the optimizer have"
        )


def chosen_tile(
    tile: int | str | None, optimizer: type[Optimizer], groups: Iterable[Mapping[str, Any]], gpu: bool
) -> int | str | None:
    """Returns what ``tile=auto`` stands for, and any other value as it is.

    On a GPU it is ``fused`` if the optimizer can be: a tile takes less time there than launching its kernels, and
    steps in tiles took 11 to 18 times as long (benchmarks/README.md, docs/muon.md). Otherwise it is the paper's size.

    Args:
        tile: See :class:`tedlab.optim.ShardedOptimizer`.
        optimizer: Exact class of the optimizer.
        groups: Its parameter groups, or the arguments of its constructor.
        gpu: Whether it steps on a GPU that has the kernel.
    """
    if tile != "auto":
        return tile
    return "fused" if gpu and all(_unfit(optimizer, group) is None for group in groups) else TILE


def has_kernel(device: torch.device) -> bool:
    """Tells whether a device has the kernel of the fused step: Triton compiles it, with the help of a C compiler."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    compiler = "CC" in os.environ or any(map(shutil.which, ("gcc", "clang")))
    return compiler and torch.cuda.get_device_capability(device) >= _OLDEST


def _unfit(optimizer: type[Optimizer], options: Mapping[str, Any]) -> str | None:
    """Says why a fused step does not compute what an optimizer does, and what else would do; None if it does."""
    if optimizer not in (Adam, AdamW):
        return f"computes torch.optim.AdamW and torch.optim.Adam, not {optimizer.__qualname__}; use one of these"
    unknown = next((option for option in ("amsgrad", "maximize") if options.get(option)), None)
    return None if unknown is None else f"knows no {unknown}; leave that out"


def fresh_state(master: Tensor) -> dict[str, Tensor]:
    """Returns the state of an Adam that has not stepped yet, as torch keeps it."""
    return {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}


@torch.no_grad()
def fused_adam_step(
    master: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
    group: Mapping[str, Any],
    *,
    factor: float = 1.0,
    rounded: Tensor | None = None,
    kernel: Kernel | None = None,
) -> None:
    """Makes one step of ``torch.optim.Adam`` or ``AdamW`` in place, equal up to rounding.

    fp32 on a GPU uses one Triton kernel, whatever the gradient's dtype. Everything else uses torch's own fused kernel,
    which needs gradients in the dtype of the state. It gets them in tiles that stay in cache, so that it, too, passes
    over memory once; the temporary is one upcast tile, at most 262,144 elements (1 MiB), or none without upcasting.

    Args:
        master: Flat parameters in the precision that is updated.
        gradient: Gradient in any floating dtype; its values are lost.
        state: State of ``master`` in the optimizer: ``step``, ``exp_avg`` and ``exp_avg_sq``, as torch keeps them; it
            is filled in if empty.
        group: The optimizer's parameter group, with ``decoupled_weight_decay`` for AdamW.
        factor: Factor on the gradient (clipping, loss scale).
        rounded: Half-precision copy of ``master``, which is updated with it.
        kernel: Computes the step from the arguments before it; None: the fastest that the device has.

    Source: Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2.
    """
    if not state:
        state.update(fresh_state(master))
    state["step"] += 1
    fastest = _triton_step if master.is_cuda and master.dtype == torch.float32 else _torch_step
    (kernel or fastest)(master, gradient, state, group, factor, rounded)


def _torch_step(
    master: Tensor,
    gradient: Tensor,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    factor: float,
    rounded: Tensor | None,
) -> None:
    kernel = fused_adam(group["decoupled_weight_decay"])
    beta1, beta2 = map(float, group["betas"])
    options: dict[str, Any] = {"lr": float(group["lr"]), "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
    options |= {"weight_decay": group["weight_decay"], "amsgrad": False, "maximize": False}
    step = state["step"].to(master.device)  # the kernel wants it there; torch keeps it on the CPU
    tensors = (master, gradient, state["exp_avg"], state["exp_avg_sq"], master if rounded is None else rounded)
    buffer = master.new_empty(0 if gradient.dtype == master.dtype else min(_TILE, master.numel()))
    for p, g, m, v, r in zip(*(t.split(_TILE) for t in tensors), strict=True):
        wide = g if g.dtype == p.dtype else buffer[: len(g)].copy_(g)
        if factor != 1.0:
            wide.mul_(factor)
        kernel([p], [wide], [m], [v], [], [step], **options)
        if rounded is not None:
            r.copy_(p)


def _triton_step(
    master: Tensor,
    gradient: Tensor,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    factor: float,
    rounded: Tensor | None,
) -> None:
    from tedlab.optim.adam_kernel import launch  # only torch for GPUs includes Triton

    beta1, beta2 = map(float, group["betas"])
    lr, decay, step = float(group["lr"]), float(group["weight_decay"]), state["step"].item()
    decoupled = group["decoupled_weight_decay"]
    launch(
        master,
        gradient,
        state["exp_avg"],
        state["exp_avg_sq"],
        rounded,
        # These are float64: in fp32, 1 - 0.999 and early steps' bias corrections would have a relative error of 5e-5.
        factor=factor,
        l2=0.0 if decoupled else decay,
        keep=1.0 - lr * decay if decoupled else 1.0,
        beta1=beta1,
        rest1=1.0 - beta1,
        beta2=beta2,
        rest2=1.0 - beta2,
        rate=lr / (1.0 - beta1**step),
        unbias=1.0 / math.sqrt(1.0 - beta2**step),
        eps=float(group["eps"]),
    )
