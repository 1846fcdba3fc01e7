"""Counts collectives below every library that issues them, so that two libraries are counted by one rule.

tedlab uses torch's functional collectives, others the calls of ``torch.distributed``; both pass torch's dispatcher.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Bytes sent per byte of the whole buffer, times n / (n - 1): bandwidth-optimal (ring) algorithms in a group of n.
_PASSES = {
    "all_reduce": 2,
    "all_gather": 1,
    "reduce_scatter": 1,
    "all_to_all": 1,
    "reduce": 1,
    "broadcast": 1,
    "barrier": 0,
}
_LOCAL = ("wait_tensor", "_wrap_tensor_autograd")  # they communicate nothing


@dataclass
class Volume:
    """Of all collectives of one kind in a step, in one process."""

    calls: int = 0
    sent: float = 0.0  # bytes


class CollectiveRecorder(TorchDispatchMode):
    """While active, counts the calls and the sent bytes of every collective of this thread.

    Args:
        tensor_group: the ranks that share a layer; any other group counts as ``data``. Experts are exchanged between
            the same ranks as data, by the all-to-alls.

    Attributes:
        volumes: by (phase, group, operation).
        in_forward: whether the model's forward pass is running; to be set from outside.
    """

    def __init__(self, tensor_group: Sequence[int]) -> None:
        super().__init__()
        self.tensor_group = list(tensor_group)
        self.volumes: dict[tuple[str, str, str], Volume] = defaultdict(Volume)
        self.in_forward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]  # without that of the overload
        if func.namespace in ("c10d", "_c10d_functional") and name not in _LOCAL:
            self._count(func, _operation(name), (*args, *(kwargs or {}).values()), result)
        return result

    def _count(self, func: Any, operation: str, arguments: tuple[Any, ...], result: Any) -> None:
        ranks = get_process_group_ranks(_group(func, arguments))
        # What goes in or what comes out: the larger is the whole buffer, whichever the operation.
        buffer = max(_bytes(part) for part in (*arguments, result))
        # A group of one launches, but sends nothing.
        sent = buffer * _PASSES[operation] * (len(ranks) - 1) / len(ranks)
        group = "tensor" if ranks == self.tensor_group else "expert" if operation == "all_to_all" else "data"
        volume = self.volumes[self._phase(group), group, operation]
        volume.calls += 1
        volume.sent += sent

    def _phase(self, group: str) -> str:
        if group == "data":
            return "update"  # gradients, whether they are reduced within the backward pass or after it
        if torch._C._current_graph_task_id() == -1:
            return "forward" if self.in_forward else "update"
        return "recompute" if _recomputing() else "backward"


def _operation(name: str) -> str:
    squeezed = name.replace("_", "")
    for operation in _PASSES:  # "reduce" comes after those that it is a part of
        if squeezed.startswith(operation.replace("_", "")):
            return operation
    raise NotImplementedError(f"a collective that this recorder does not know: {name}")


def _group(func: Any, arguments: tuple[Any, ...]) -> ProcessGroup:
    names = [argument.name for argument in func._schema.arguments]
    if func.namespace == "c10d":
        return ProcessGroup.unbox(arguments[names.index("process_group")])
    return _resolve_process_group(arguments[names.index("group_name")])


def _bytes(part: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(part) if isinstance(leaf, Tensor))


def _recomputing() -> bool:
    """Whether the backward pass has called activation checkpointing, which has called us."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
    return False
