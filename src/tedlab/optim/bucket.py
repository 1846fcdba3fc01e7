"""A bucket: parameters that are reduced, stepped and gathered as one flat piece of memory.

This module owns the memory and its communication; ``sharded.py`` decides what an optimizer does with it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tedlab._compat.torch import set_local_tensor, shape_and_offset_of_shard, spec_of, storage_address
from tedlab.comm import Collectives, GroupKind, Pending, Phase

_gradients: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # those that buckets hold, by their storage

BucketKey = TypeVar("BucketKey", bound=tuple[Any, ...])
Parameter = TypeVar("Parameter")


def lay_out(
    parameters: Iterable[Parameter],
    key: Callable[[Parameter], BucketKey],
    elements: Callable[[Parameter], int],
    most: int,
) -> Iterator[tuple[BucketKey, list[Parameter]]]:
    """Yields the parameters of each bucket: those with the same key, in order, until the next would not fit.

    The optimizer and the closed form of its communication share this layout.

    Args:
        parameters: Parameters or their specifications.
        key: Returns what the parameters of a bucket have in common; buckets are in the order of their keys.
        elements: Returns the number of a parameter's elements that this process holds.
        most: Maximum number of elements of a bucket; a larger parameter has one to itself.
    """
    alike: dict[BucketKey, list[Parameter]] = {}
    for parameter in parameters:
        alike.setdefault(key(parameter), []).append(parameter)
    for common in sorted(alike):
        bucket: list[Parameter] = []
        held = 0
        for parameter in alike[common]:
            size = elements(parameter)
            if bucket and held + size > most:
                yield common, bucket
                bucket, held = [], 0
            bucket.append(parameter)
            held += size
        yield common, bucket


class Bucket:
    """Parameters of one optimizer group, one reduction group, one dtype and one number of holders.

    Their local values move into one flat buffer, padded to divide evenly, of which this process owns one part: the
    shard. A half-precision shard has an fp32 master copy.

    Args:
        parameters: Parameters of the bucket, in order.
        comm: The collectives of this process.
        sharded: Whether each process of the reduction group owns a part (ZeRO-1); otherwise each owns everything.
        partial: Whether gradients are also partial sums over the tensor group (of parameters that each tensor rank
            used for its own tokens); see :meth:`ShardedOptimizer.reduce_gradients`.

    Attributes:
        present: Parameters that got a gradient since the last step: in this process, until all processes have agreed.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], comm: Collectives, sharded: bool, partial: bool = False
    ) -> None:
        self.partial = partial
        self.parameters = list(parameters)
        self.comm = comm
        self.kind = reduction_group(parameters[0])
        self.sharded = sharded and comm.size(self.kind) > 1
        locals_ = [local(p) for p in parameters]
        self.sizes = [x.numel() for x in locals_]
        self.shards = comm.size(self.kind) if self.sharded else 1
        self.shard_size = -(-sum(self.sizes) // self.shards)
        self.flat = locals_[0].new_zeros(self.shards * self.shard_size)
        for p, x, part in zip(parameters, locals_, self.parts(self.flat), strict=True):
            part.copy_(x.flatten())
            _set_local(p, part.view(x.shape))
        rank = comm.rank(self.kind) if self.sharded else 0
        self.own = slice(rank * self.shard_size, (rank + 1) * self.shard_size)
        self.shard = self.flat[self.own]
        self.master = self.shard.float() if self.flat.dtype in (torch.float16, torch.bfloat16) else self.shard
        self.present: set[nn.Parameter] = set()
        self._collected: dict[nn.Parameter, Tensor] = {}  # local gradients, not yet reduced
        self._reduction: Pending | None = None
        self.gradient: Tensor | None = None  # the shard's gradient, summed over data ranks, in the parameters' dtype
        self.new_partial: Tensor | None = None  # the last pass's, not yet summed over the tensor group

    @property
    def holders(self) -> int:
        """The number of processes that hold each element of the shard."""
        return holders(self.parameters[0], self.comm) // self.shards

    def collect_gradient(self, parameter: nn.Parameter) -> None:
        """Takes a parameter's gradient, if it has one, and adds it to those of earlier backward passes.

        It is called as soon as the gradient is there, so that few new ones exist at a time beside the sum. torch takes
        many times as long to add a gradient that stays in place, since that is a DTensor.
        """
        if parameter.grad is not None:
            new, earlier = local(parameter.grad), self._collected.get(parameter)
            self._collected[parameter] = _taken(new) if earlier is None else earlier.add_(new)
            self.present.add(parameter)
            parameter.grad = None

    def start_reduction(self) -> None:
        """Launches the sum of the parameters' gradients over the group, and frees them.

        A parameter without a gradient adds zeros, since another process of the group may have one. Whether a process
        takes part therefore depends only on what all processes know: which parameters are to have gradients.
        """
        for p in self.parameters:
            self.collect_gradient(p)  # one that the hook did not collect
        if not (self._collected or any(p.requires_grad for p in self.parameters)):
            return
        self.finish_reduction()  # that of an earlier pass
        start = self.comm.start_reduce_scatter if self.sharded else self.comm.start_all_reduce
        self._reduction = start(self._joined(), self.kind, tag="gradients.reduce", phase="optimizer")

    def _joined(self) -> Tensor:
        """Joins the collected gradients, laid out like the bucket; the only one of a full bucket is not copied."""
        found = [self._collected.pop(p, None) for p in self.parameters]
        parts = [
            self.flat.new_zeros(size) if gradient is None else gradient.flatten()
            for gradient, size in zip(found, self.sizes, strict=True)
        ]
        if padding := self.flat.numel() - sum(self.sizes):
            parts.append(self.flat.new_zeros(padding))
        return torch.cat(parts) if parts[1:] else parts[0]

    def finish_reduction(self) -> None:
        """Waits for the sum, and adds it to the shard's gradient."""
        if self._reduction is None:
            return
        reduced = self._reduction.wait()
        self._reduction = None
        if self.partial:  # kept apart: earlier passes' gradients are no longer partial sums
            self.new_partial = reduced if self.new_partial is None else self.new_partial.add_(reduced)
        else:
            self._add(reduced)

    def add_partial(self) -> None:
        """Adds the new part of the gradient, which must be summed over the tensor group by now."""
        if self.new_partial is not None:
            self._add(self.new_partial)
            self.new_partial = None

    def _add(self, reduced: Tensor) -> None:
        self.gradient = reduced if self.gradient is None else self.gradient.add_(reduced)

    @property
    def unreduced(self) -> bool:
        """Whether there are gradients that no reduction has taken yet."""
        return bool(self._collected)

    def clear_gradients(self, set_to_none: bool = True) -> None:
        """Drops all gradients; with ``set_to_none=False`` the shard's is zeroed instead."""
        self.finish_reduction()
        self._collected.clear()
        self.new_partial = None
        for p in self.parameters:
            p.grad = None
        if set_to_none:
            self.gradient = None
            self.present.clear()
        elif self.gradient is not None:
            self.gradient.zero_()

    def gather_parameters(self) -> None:
        """Gathers the updated shards over the group."""
        if self.sharded:
            self.comm.all_gather_into(self.flat, self.shard, self.kind, tag="parameters.gather", phase="optimizer")

    def gather(self, shard: Tensor, *, tag: str = "state.gather", phase: Phase = "checkpoint") -> Tensor:
        """Gathers all shards of what is divided like the bucket (a gradient, an optimizer's moment) into new memory.

        Collective over the group.
        """
        if not self.sharded:
            return shard.clone()
        flat = shard.new_empty(self.flat.numel())
        self.comm.all_gather_into(flat, shard.contiguous(), self.kind, tag=tag, phase=phase)
        return flat

    def unshard(self, shard: Tensor, *, tag: str = "state.gather", phase: Phase = "checkpoint") -> list[Tensor]:
        """Gathers a tensor of the shard's size and returns one tensor per parameter.

        They are sharded like the parameters (DTensors for DTensors). Collective over the group.
        """
        parts = self.parts(self.gather(shard, tag=tag, phase=phase))
        return [like(p, part.view(local(p).shape)) for p, part in zip(self.parameters, parts, strict=True)]

    def shard_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Inverts :meth:`unshard`: returns this process's shard of one tensor per parameter."""
        flat = local(tensors[0]).new_zeros(self.flat.numel())
        for tensor, part in zip(tensors, self.parts(flat), strict=True):
            part.copy_(local(tensor).flatten())
        return flat[self.own]

    def parts(self, flat: Tensor) -> Sequence[Tensor]:
        """Splits a flat tensor that is laid out like the bucket into one flat part per parameter."""
        return flat[: sum(self.sizes)].split(self.sizes)

    def numbers(self, where: slice, first: Mapping[nn.Parameter, int]) -> Tensor:
        """Returns the number, in the whole model, of each element of a range of this process's shard; int64, flat.

        Args:
            where: The range.
            first: The number of each parameter's first element.
        """
        found: list[Tensor] = []
        begin, end = where.start + self.own.start, where.stop + self.own.start
        start = 0
        for p, size in zip(self.parameters, self.sizes, strict=True):
            last = self.flat.numel() if p is self.parameters[-1] else start + size
            inside = slice(max(begin, start) - start, min(end, last) - start)
            if inside.start < inside.stop:
                found.append(numbers_of(p, inside, first[p]))
            start = last
        return torch.cat(found) if found else self.shard.new_empty(0, dtype=torch.int64)

    def ranges(self, parameters: Collection[nn.Parameter]) -> list[slice]:
        """Returns where this process's shard holds these parameters, in order; the last parameter includes the padding.

        If it holds none of them, there is one empty range.
        """
        found: list[slice] = []
        start = 0
        for p, size in zip(self.parameters, self.sizes, strict=True):
            end = self.flat.numel() if p is self.parameters[-1] else start + size
            first, last = max(start, self.own.start) - self.own.start, min(end, self.own.stop) - self.own.start
            if p in parameters and first < last:
                if found and found[-1].stop == first:
                    first = found.pop().start
                found.append(slice(first, last))
            start = end
        return found or [slice(0, 0)]


def numbers_of(parameter: Tensor, where: slice, first: int) -> Tensor:
    """Returns the numbers of a process's elements of a parameter in the whole model, the same in every layout.

    Args:
        parameter: The parameter, whose global elements are numbered in order.
        where: Which of this process's elements, flattened; those after the last are padding, with any numbers.
        first: The number of the parameter's first element.

    Returns:
        int64, flat.
    """
    shape, offset = (*local(parameter).shape,), (0,) * parameter.dim()
    if isinstance(parameter, DTensor):
        _, offset = shape_and_offset_of_shard(parameter.shape, parameter.device_mesh, parameter.placements)
    rest = torch.arange(where.start, where.stop, device=local(parameter).device)
    numbers, stride = torch.full_like(rest, first), 1
    for size, start, whole in zip(reversed(shape), reversed(offset), reversed(parameter.shape), strict=True):
        numbers += (rest % size + start) * stride
        rest, stride = rest // size, stride * whole
    return numbers


def reduction_group(parameter: nn.Parameter) -> GroupKind:
    """Returns the group that a gradient is summed over: the first axis of the parameter's mesh, or else ``data``."""
    if not isinstance(parameter, DTensor):
        return "data"
    return "expert_data" if _axes(parameter.device_mesh)[0] == "expert_data" else "data"


def holders(parameter: Tensor, comm: Collectives) -> int:
    """Returns the number of processes that hold each element of a parameter."""
    count = comm.size("world")
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                count //= parameter.device_mesh.size(axis)
    return count


def local(tensor: Tensor) -> Tensor:
    """Returns this process's part as a plain tensor that shares memory."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():  # to_local then returns the tensor itself
        return tensor.to_local().detach()


def _taken(gradient: Tensor) -> Tensor:
    """Returns a gradient that may be changed in place: two parameters that are added up get the same one."""
    address = storage_address(gradient)
    if address in _gradients:
        gradient = gradient.clone()
        address = storage_address(gradient)
    _gradients[address] = gradient
    return gradient


def _axes(mesh: DeviceMesh) -> tuple[str, ...]:
    assert mesh.mesh_dim_names is not None
    return mesh.mesh_dim_names


def _set_local(parameter: nn.Parameter, values: Tensor) -> None:
    if isinstance(parameter, DTensor):
        set_local_tensor(parameter, values)
    else:
        parameter.data = values


def like(parameter: Tensor, values: Tensor) -> Tensor:
    """Returns this process's part of a tensor that is sharded like a parameter."""
    if not isinstance(parameter, DTensor):
        return values
    if values.dtype == parameter.dtype:  # then the specification is the same, which from_local takes long to make
        return DTensor(values, spec_of(parameter), requires_grad=False)
    return DTensor.from_local(values, parameter.device_mesh, parameter.placements, run_check=False)
