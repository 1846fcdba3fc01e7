"""Launches torch's collectives in one of two ways: as functional collectives, or in place.

A launch returns a function that waits for the result, which is a new tensor or the one to be filled. Inputs do not
change. CUDA tensors are exchanged in place: with functional collectives the host takes several times as long to launch
one (0.5 ms under NCCL on a machine where a layer takes 7), and gloo crashes with them (torch 2.11).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from tedlab._compat.torch import collective_operators, functional_collectives

Wait = Callable[[], Tensor]

_ops = collective_operators
_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# The first names exist from torch 2.13 on.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Way(Protocol):
    """A way to launch collectives. Below, n is the number of processes in the group."""

    def all_reduce(self, x: Tensor, op: str, group: ProcessGroup) -> Wait:
        """Reduces element-wise; ``op`` is ``sum``, ``max`` or ``min``."""
        ...

    def all_to_all(self, x: Tensor, received: list[int] | None, sent: list[int] | None, group: ProcessGroup) -> Wait:
        """Exchanges slices along dimension 0, of the given sizes or, if they are None, n equal ones."""
        ...

    def reduce_scatter(self, x: Tensor, group: ProcessGroup) -> Wait:
        """Sums over the group and returns this process's slice, 1/n of dimension 0."""
        ...

    def all_gather(self, x: Tensor, group: ProcessGroup) -> Wait:
        """Concatenates all processes' ``x`` along dimension 0, which becomes n times as large."""
        ...

    def all_gather_into(self, out: Tensor, x: Tensor, group: ProcessGroup) -> Wait:
        """Gathers into ``out``, of which ``x`` may be a part."""
        ...


def way_of(x: Tensor, group: ProcessGroup) -> Way:
    """Returns the way that is safe for this tensor in this group."""
    backend = dist.get_backend(group)
    if x.is_cuda and backend in ("gloo", "nccl"):
        return _IN_PLACE
    return ways.get(backend, _FUNCTIONAL)


class Functional:
    """Torch's functional collectives."""

    def all_reduce(self, x: Tensor, op: str, group: ProcessGroup) -> Wait:
        return _awaited(functional_collectives.all_reduce(x.contiguous(), op, group))

    def all_to_all(self, x: Tensor, received: list[int] | None, sent: list[int] | None, group: ProcessGroup) -> Wait:
        return _awaited(functional_collectives.all_to_all_single(x.contiguous(), received, sent, group))

    def reduce_scatter(self, x: Tensor, group: ProcessGroup) -> Wait:
        return _awaited(
            collective_operators.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
        )

    def all_gather(self, x: Tensor, group: ProcessGroup) -> Wait:
        return _awaited(_ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))

    def all_gather_into(self, out: Tensor, x: Tensor, group: ProcessGroup) -> Wait:
        return _awaited(_ops.all_gather_into_tensor_out(x, group.size(), group.group_name, out=out))


def _awaited(result: Tensor) -> Wait:
    return lambda: functional_collectives.wait_tensor(result)


class _InPlace:
    def all_reduce(self, x: Tensor, op: str, group: ProcessGroup) -> Wait:
        out = x.detach().clone(memory_format=torch.contiguous_format)
        return _filled(out, dist.all_reduce(out, _REDUCTIONS[op], group, async_op=True))

    def all_to_all(self, x: Tensor, received: list[int] | None, sent: list[int] | None, group: ProcessGroup) -> Wait:
        out = x.new_empty(len(x) if received is None else sum(received), *x.shape[1:])
        return _filled(out, dist.all_to_all_single(out, x.contiguous(), received, sent, group, async_op=True))

    def reduce_scatter(self, x: Tensor, group: ProcessGroup) -> Wait:
        out = x.new_empty(len(x) // group.size(), *x.shape[1:])
        return _filled(out, _reduce_scatter(out, x.contiguous(), group=group, async_op=True))

    def all_gather(self, x: Tensor, group: ProcessGroup) -> Wait:
        return self.all_gather_into(x.new_empty(len(x) * group.size(), *x.shape[1:]), x.contiguous(), group)

    def all_gather_into(self, out: Tensor, x: Tensor, group: ProcessGroup) -> Wait:
        return _filled(out, _all_gather(out, x, group, async_op=True))


def _filled(out: Tensor, work: dist.Work) -> Wait:
    def wait() -> Tensor:
        work.wait()
        return out

    return wait


_FUNCTIONAL, _IN_PLACE = Functional(), _InPlace()
ways: dict[str, Way] = {}  # by backend, for those that cannot use the default
