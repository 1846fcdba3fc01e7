"""Collectives inside ``torch.compile``.

The compiler must neither trace into a collective nor drop it. Each is therefore one opaque custom operator, and hooks
are called when it runs, in a compiled program as in an eager one.
"""

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tedlab._compat.torch import in_backward

_instances: WeakValueDictionary[int, Any] = WeakValueDictionary()  # instances of Collectives
_numbers = itertools.count()


def register(comm: Any) -> int:
    """Returns a number for an instance of ``Collectives``, because custom operators take no objects."""
    number = next(_numbers)
    _instances[number] = comm
    return number


@torch.library.custom_op("tedlab::collective", mutates_args=())
def run(x: Tensor, op: str, kind: str, tag: str, phase: str, number: int) -> Tensor:
    """Calls ``Collectives.<op>(x, kind, tag=tag, phase=phase)`` on a registered instance."""
    if phase == "forward" and in_backward():
        phase = "recompute"  # the compiler has put a copy of the forward pass into the backward pass
    result: Tensor = getattr(_instances[number], op)(x, kind, tag=tag, phase=phase)
    return result.clone() if result is x else result


@run.register_fake
def _(x: Tensor, op: str, kind: str, tag: str, phase: str, number: int) -> Tensor:
    size = _instances[number].size(kind)
    if op == "all_gather":
        return x.new_empty(x.shape[0] * size, *x.shape[1:])
    if op == "reduce_scatter":
        return x.new_empty(x.shape[0] // size, *x.shape[1:])
    return torch.empty_like(x, memory_format=torch.contiguous_format)
