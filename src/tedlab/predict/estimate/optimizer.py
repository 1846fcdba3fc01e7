"""What an optimizer keeps, moves and needs for each element of a parameter, counted in a step that it takes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import hydra
import torch
from torch import Tensor

from tedlab._compat.torch import TorchDispatchMode
from tedlab.optim import NarrowAdamW
from tedlab.optim.bucket import numbers_of
from tedlab.predict.sim.memory import StorageTracker
from tedlab.predict.sim.roofline import tensors_in, work_of

# So many elements that a step count is nothing beside them; with as many dimensions as experts, which most are of.
_SHAPE, _MATRIX = (16, 16, 16), (64, 64)
_KERNELS = ("capturable", "foreach", "fused")  # options that choose a kernel, some of them for GPUs only
_counted: dict[str, "PerElement"] = {}  # by the optimizer's options; a plan asks thousands of times


class PerElement(NamedTuple):
    """Bytes for each element of a parameter.

    Attributes:
        kept: From one step to the next.
        moved: Read and written by the kernels of a step.
        temporary: The most that a step needs beside parameter, gradient and state.
    """

    kept: int
    moved: int
    temporary: int


def per_element(options: Mapping[str, Any], matrix: bool = False, master: int = 4) -> PerElement:
    """Counts what an optimizer needs, by letting it take two steps, of which the first makes the state.

    Args:
        options: The class and arguments of the optimizer.
        matrix: Whether the parameter is in a group of matrices, of an optimizer that needs these whole.
        master: The bytes of an element of the parameter, or of its master copy.
    """
    key = repr((options, matrix, master))
    if key not in _counted:
        settings = {name: value for name, value in options.items() if name not in _KERNELS}
        dtype = torch.float64 if master == 8 else torch.float32
        parameter = torch.nn.Parameter(torch.ones(_MATRIX if matrix else _SHAPE, dtype=dtype))
        parameter.grad = torch.ones_like(parameter)
        group: dict[str, Any] = {"params": [parameter], "matrix": matrix}
        optimizer = hydra.utils.instantiate(settings, _partial_=True)([group], lr=1e-3)
        if isinstance(optimizer, NarrowAdamW):  # as in a run, where tiles are parts of parameters
            optimizer.numbers = lambda p: torch.cat([numbers_of(p, slice(0, p.numel()), 0)])
        optimizer.step()
        state = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
        kept = sum(value.itemsize for value in state if value.shape == parameter.shape)
        with _Counting([parameter, parameter.grad, *state]) as counted:
            optimizer.step()
        temporary = int(counted.memory.timeline().held["temporaries"].max())
        _counted[key] = PerElement(kept, *(round(size / parameter.numel()) for size in (counted.moved, temporary)))
    return _counted[key]


class _Counting(TorchDispatchMode):
    """Counts the bytes that kernels move, and those of all tensors but the ones that there are."""

    def __init__(self, there: Sequence[Tensor]) -> None:
        super().__init__()
        self.moved, self.memory = 0.0, StorageTracker(lambda: 0)
        self.memory.see(there, "parameters")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        work = work_of(func, args, kwargs or {}, out)
        self.moved += 0 if work is None else work.bytes
        self.memory.see(tensors_in((out,)), "temporaries")
        return out
