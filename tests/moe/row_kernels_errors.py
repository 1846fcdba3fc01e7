"""Prints, as JSON, how far the Triton kernels on rows are from ``row_ops.py`` in float64. A program of its own, because

Triton's interpreter, which runs kernels on CPUs, must be chosen before Triton is imported (TRITON_INTERPRET=1).
"""

import itertools
import json
import sys

import torch
from torch import Tensor

from tedlab.moe import row_kernels, row_ops
from tedlab.nn import Nonlinearity

TOKENS, CHOICES, EXPERTS, HIDDEN, INNER = 5, 3, 4, 20, 1100  # neither a power of two; more columns than one block has

ACTIVATIONS = (Nonlinearity(), Nonlinearity("swiglu"), Nonlinearity("clamped_swiglu", 0.7))


def main(device: str) -> None:
    errors = {}
    for dtype, how, biased in itertools.product((torch.float32, torch.bfloat16), ACTIVATIONS, (False, True)):
        draw = torch.Generator().manual_seed(1)

        def numbers(
            *shape: int, draw: torch.Generator = draw, dtype: torch.dtype = dtype, by_column: bool = biased
        ) -> Tensor:
            drawn = torch.randn(shape, generator=draw).to(dtype)
            return drawn.mT.contiguous().mT if by_column else drawn  # kernels take any strides

        count = TOKENS * CHOICES
        place = torch.randperm(count, generator=draw).view(TOKENS, CHOICES)
        expert = torch.randint(EXPERTS, (count,), generator=draw)
        gate = torch.rand(CHOICES, TOKENS, generator=draw).mT if biased else torch.rand(TOKENS, CHOICES, generator=draw)
        gaps = torch.rand(count, generator=draw) < 0.3
        behind = torch.arange(count) >= count - 4  # for these rows there is room, which nobody fills or reads
        width = 2 * INNER if how.gated else INNER
        bias, last = (numbers(EXPERTS, width), numbers(EXPERTS, HIDDEN)) if biased else (None, None)
        calls = {
            "take": (numbers(TOKENS, HIDDEN), place.flatten() // CHOICES),
            "hidden": (numbers(count, width), bias, expert, how),
            "hidden_backward": (
                numbers(count, INNER), numbers(count, width), bias, expert, gate.flatten(), how,
            ),
            "hidden, with room": (numbers(count, width), bias, torch.where(behind, -1, expert), how),
            "hidden_backward, with room": (
                numbers(count, INNER), numbers(count, width), bias, torch.where(behind, -1, expert), gate.flatten(),
                how,
            ),
            "take, with room": (numbers(TOKENS, HIDDEN), torch.where(behind, -1, place.flatten() // CHOICES)),
            "combine": (numbers(count, HIDDEN), place, gate, last, expert.view(TOKENS, CHOICES)),
            "take, some missing": (numbers(TOKENS, HIDDEN), torch.where(gaps, -1, place.flatten() // CHOICES)),
            "sums": (numbers(count, HIDDEN), torch.where(gaps.view_as(place), -1, place)),
            "combine, some missing": (
                numbers(count, HIDDEN), torch.where(gaps.view_as(place), -1, place), gate, None, place,
            ),
            "combine_backward": (
                numbers(TOKENS, HIDDEN), numbers(count, HIDDEN), gate, torch.where(gaps, -1, place.flatten()),
            ),
            "hidden_backward, unweighted": (
                numbers(count, INNER), numbers(count, width), bias, expert, None, how,
            ),
            "combine, unweighted": (numbers(count, HIDDEN), place, None, None, expert.view(TOKENS, CHOICES)),
        }  # fmt: skip
        for name, arguments in calls.items():
            function = name.split(",")[0]
            missing = {"missing": True} if name == "take, some missing" else {}
            ours = getattr(row_kernels, function)(*(_moved(a, device) for a in arguments), **missing)
            theirs = getattr(row_ops, function)(*(_moved(a, "cpu", precise=True) for a in arguments), **missing)
            pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
            kept = [(a.cpu().double(), b) for a, b in pairs if a is not None]
            if name.endswith("with room"):
                kept = [(a[:-4], b[:-4]) for a, b in kept]
            worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in kept)
            errors[f"{name} {dtype} {how.name} biased={biased}"] = worst
    print(json.dumps(errors))


def _moved(argument: object, device: str, precise: bool = False) -> object:
    if not isinstance(argument, Tensor):
        return argument
    return argument.double() if precise and argument.is_floating_point() else argument.to(device)


if __name__ == "__main__":
    main(sys.argv[1])
