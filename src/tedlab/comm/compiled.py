"""Collectives and activation checkpointing inside ``torch.compile``.

The compiler must neither look into a collective nor lose sight of it: here each is one opaque operation, so that hooks
hear of it when it runs, in the compiled program as in the eager one. What recomputation keeps (CAC) is there the policy
of torch's selective checkpointing, by tag; what becomes dead by it the compiler leaves out itself.
"""

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from tedlab.comm.collectives import Collectives
    from tedlab.comm.recompute import Plan

_instances: "WeakValueDictionary[int, Collectives]" = WeakValueDictionary()
_numbers = itertools.count()


def register(comm: "Collectives") -> int:
    """A number for an instance: operations take no objects."""
    number = next(_numbers)
    _instances[number] = comm
    return number


@torch.library.custom_op("tedlab::collective", mutates_args=())
def run(x: Tensor, op: str, kind: str, tag: str, phase: str, number: int) -> Tensor:
    """``Collectives.<op>(x, kind, tag, phase)`` of a registered instance."""
    if phase == "forward" and torch._C._current_graph_task_id() != -1:
        phase = "recompute"  # the compiler has put a copy of the forward pass into the backward pass
    result: Tensor = getattr(_instances[number], op)(x, kind, tag=tag, phase=phase)
    return result.clone() if result is x else result


@run.register_fake
def _(x: Tensor, op: str, kind: str, tag: str, phase: str, number: int) -> Tensor:
    size = _instances[number].size(kind)  # type: ignore[arg-type]
    if op == "all_gather":
        return x.new_empty(x.shape[0] * size, *x.shape[1:])
    if op == "reduce_scatter":
        return x.new_empty(x.shape[0] // size, *x.shape[1:])
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def contexts(plan: "Plan") -> Callable[[], Any]:
    """The ``context_fn`` of a region that is checkpointed and compiled: keeps what the plan keeps, and decisions.

    A plan's slices are not known here, only whole results.
    """
    from tedlab.comm.recompute import Second

    kept = {tag for tag, second in plan.items() if second is Second.WHOLE}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op is torch.ops.tedlab.collective.default and args[3] in kept:
            return CheckpointPolicy.MUST_SAVE
        if op in (torch.ops.aten.topk.default, torch.ops.aten.argmax.default):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)
