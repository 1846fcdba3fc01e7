"""A bucket: parameters that are reduced, stepped and gathered as one flat piece of memory.

Here is the memory and its communication; what an optimizer does with it is in ``sharded.py``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tedlab.comm import Collectives, GroupKind, Pending


class Bucket:
    """Parameters of one optimizer group, one reduction group, one dtype and one number of holders.

    Their local values move into one flat buffer, padded so that it divides evenly, of which this process owns one
    part: the shard. A half-precision shard has an fp32 master copy.

    Args:
        parameters: what it holds, in order.
        group: index of the optimizer's parameter group that they belong to.
        comm: the collectives of this process.
        sharded: whether each process of the reduction group owns a part (ZeRO-1), or all of them everything.
        partial: whether gradients are also partial sums over the tensor group (of parameters that each tensor rank
            used for its own tokens); see :meth:`ShardedOptimizer.reduce_gradients`.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], group: int, comm: Collectives, sharded: bool, partial: bool = False
    ) -> None:
        self.partial = partial
        self.parameters = list(parameters)
        self.group = group
        self.comm = comm
        self.kind = reduction_group(parameters[0])
        self.sharded = sharded and comm.size(self.kind) > 1
        locals_ = [local(p) for p in parameters]
        self.sizes = [x.numel() for x in locals_]
        self.shards = comm.size(self.kind) if self.sharded else 1
        self.shard_size = -(-sum(self.sizes) // self.shards)
        self.flat = locals_[0].new_zeros(self.shards * self.shard_size)
        for p, x, part in zip(parameters, locals_, self._parts(self.flat), strict=True):
            part.copy_(x.flatten())
            _set_local(p, part.view(x.shape))
        rank = comm.rank(self.kind) if self.sharded else 0
        self._own = slice(rank * self.shard_size, (rank + 1) * self.shard_size)
        self.shard = self.flat[self._own]
        self.master = self.shard.float() if self.flat.dtype in (torch.float16, torch.bfloat16) else self.shard
        self._collected: dict[nn.Parameter, Tensor] = {}  # local gradients, not yet reduced
        self._reduction: Pending | None = None
        self.gradient: Tensor | None = None  # of the shard, reduced, in the parameters' dtype

    @property
    def holders(self) -> int:
        """How many processes hold each element of the shard."""
        return holders(self.parameters[0], self.comm) // self.shards

    def collect_gradient(self, parameter: nn.Parameter) -> None:
        """Takes a parameter's gradient, if it has one, adding to those of backward passes before.

        Called as soon as it is there, so that beside the sum there are only ever a few new ones. Left in place it would
        be added as a DTensor, which takes torch many times as long.
        """
        if parameter.grad is not None:
            new, earlier = local(parameter.grad), self._collected.get(parameter)
            self._collected[parameter] = new if earlier is None else earlier.add_(new)
            parameter.grad = None

    def start_reduction(self) -> None:
        """Launches the sum of the parameters' gradients over the group, and frees them.

        A parameter without a gradient counts as zeros, provided that another of the bucket has one.
        """
        for p in self.parameters:
            self.collect_gradient(p)  # where it was not left by a backward pass
        if not self._collected:
            return
        self.finish_reduction()  # of an earlier pass
        flat = torch.zeros_like(self.flat)
        for p, part in zip(self.parameters, self._parts(flat), strict=True):
            if p in self._collected:
                part.copy_(self._collected.pop(p).flatten())
        start = self.comm.start_reduce_scatter if self.sharded else self.comm.start_all_reduce
        self._reduction = start(flat, self.kind, tag="gradients.reduce", phase="optimizer")

    def finish_reduction(self) -> None:
        """Adds what was summed, divided by D, to the shard's gradient, once it is there."""
        if self._reduction is None:
            return
        reduced = self._reduction.wait()
        if self.comm.size("data") > 1:
            reduced.div_(self.comm.size("data"))
        self._reduction = None
        self.gradient = reduced if self.gradient is None else self.gradient.add_(reduced)

    def clear_gradients(self) -> None:
        """Forgets the shard's gradient and those of the parameters."""
        self.finish_reduction()
        self.gradient = None
        self._collected.clear()
        for p in self.parameters:
            p.grad = None

    def gather_parameters(self) -> None:
        """Spreads the updated shards over the group."""
        if self.sharded:
            self.comm.all_gather_into(self.flat, self.shard, self.kind, tag="parameters.gather", phase="optimizer")

    def unshard(self, shard: Tensor) -> list[Tensor]:
        """A tensor of the shard's size (a gradient, an optimizer's moment) as one tensor per parameter.

        Sharded like the parameters (DTensors for DTensors). Collective over the group.
        """
        flat = shard
        if self.sharded:
            flat = shard.new_empty(self.flat.numel())
            self.comm.all_gather_into(flat, shard.contiguous(), self.kind, tag="state.gather", phase="checkpoint")
        return [_like(p, part.view(local(p).shape)) for p, part in zip(self.parameters, self._parts(flat), strict=True)]

    def shard_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`unshard`: this process's shard of one tensor per parameter."""
        flat = local(tensors[0]).new_zeros(self.flat.numel())
        for tensor, part in zip(tensors, self._parts(flat), strict=True):
            part.copy_(local(tensor).flatten())
        return flat[self._own]

    def _parts(self, flat: Tensor) -> Sequence[Tensor]:
        return flat[: sum(self.sizes)].split(self.sizes)


def reduction_group(parameter: nn.Parameter) -> GroupKind:
    """The group over which a parameter's gradient is summed: the first axis of its mesh; ``data`` for a plain one."""
    if not isinstance(parameter, DTensor):
        return "data"
    return "expert_data" if _axes(parameter.device_mesh)[0] == "expert_data" else "data"


def holders(parameter: Tensor, comm: Collectives) -> int:
    """How many processes hold each element of a parameter."""
    count = comm.size("world")
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                count //= parameter.device_mesh.size(axis)
    return count


def local(tensor: Tensor) -> Tensor:
    """This process's part, as a plain tensor that shares memory."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():  # then it is handed out as it is
        return tensor.to_local().detach()


def _axes(mesh: DeviceMesh) -> tuple[str, ...]:
    assert mesh.mesh_dim_names is not None
    return mesh.mesh_dim_names


def _set_local(parameter: nn.Parameter, values: Tensor) -> None:
    if isinstance(parameter, DTensor):
        parameter._local_tensor = values  # DTensor offers no public way to move its memory
    else:
        parameter.data = values


def _like(parameter: nn.Parameter, values: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return DTensor.from_local(values, parameter.device_mesh, parameter.placements, run_check=False)
    return values
