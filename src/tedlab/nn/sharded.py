"""Parameters that exist only as shards: how they are declared, read in a forward pass, and initialised.

A parameter is a DTensor: its mesh and placements say which part of which global tensor this process holds, and they
survive copies and checkpoints. Layers compute on plain local tensors and call collectives explicitly.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from tedlab._compat.torch import local_tensor, spec_of
from tedlab.progress import Advance, advancing
from tedlab.spec import Fused, Init, ParameterSpec, Spec, decayed_by_name
from tedlab.topology import Topology

_BLOCK_ELEMENTS = 1 << 20  # values drawn at a time; changing it changes initial weights


def replicated(values: Tensor, topology: Topology) -> DTensor:
    """Makes a buffer that every process holds and changes alike, which nothing needs to broadcast."""
    mesh = topology.dense
    return DTensor.from_local(values.to(topology.device), mesh, [Replicate()] * mesh.ndim, run_check=False)


class ShardedModule(nn.Module):
    """Base of the layers that own sharded parameters.

    Parameters hold NaN until :func:`initialize` or a checkpoint fills them, so that forgetting both is noticed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.specs: dict[str, ParameterSpec] = {}
        self.partial: set[str] = set()  # parameters whose gradients are partial sums over the tensor group, too
        self.used: dict[str, tuple[int, int, int]] = {}  # dimension, start and length of what is used of a parameter
        self.substitutes: dict[str, Tensor] = {}  # what a compiled region uses in place of parameters
        self._gradients: dict[str, tuple[Any, Any]] = {}  # what gradients are made with, and what that was made of

    def build(self, spec: Spec, topology: Topology) -> None:
        """Declares the parameters of a specification that belong to none of its parts."""
        for parameter in spec.own():
            self.add_parameter(parameter, topology)

    def add_parameter(self, spec: ParameterSpec, topology: Topology) -> None:
        """Declares a parameter and allocates this process's part of it, in torch's default dtype.

        Raises:
            ValueError: If a dimension cannot be divided evenly.
        """
        mesh = topology.dense if spec.mesh == "dense" else topology.expert
        local_shape, divided = list(spec.shape), spec.placed(topology.degrees)
        placements: list[Placement] = []
        for axis, size in zip(mesh.mesh_dim_names or (), mesh.shape, strict=True):
            dim = divided.get(axis)
            placements.append(Replicate() if dim is None else Shard(dim))
            if dim is not None:
                if local_shape[dim] % size:
                    raise ValueError(
                        f"{type(self).__name__}.{spec.name}: dimension {dim} of {spec.shape} cannot be divided into "
                        f"{size} equal parts along mesh axis '{axis}'"
                    )
                local_shape[dim] //= size
        local = torch.full(local_shape, math.nan, device=topology.device)
        self.register_parameter(spec.name, nn.Parameter(DTensor.from_local(local, mesh, placements, run_check=False)))
        self.specs[spec.name] = spec
        if spec.partial(topology.layout):
            self.partial.add(spec.name)
        if spec.shared(topology.degrees):
            assert spec.units is not None
            dim, unit = spec.divided["tensor"], spec.shape[spec.divided["tensor"]] // spec.units
            own = topology.comm.rank("tensor") * spec.units // topology.degrees.tensor
            self.used[spec.name] = dim, own * unit, unit

    def local(self, name: str) -> Tensor:
        """Returns this process's shard as a plain tensor for computing; of units that ranks share, the one it uses.

        The parameter receives its gradient as a DTensor with true placements: a partial sum along the mesh's data axis
        (and its tensor axis, if so declared), which the strategy reduces once per step.
        """
        if name in self.substitutes:
            return self.substitutes[name]
        parameter = self.get_parameter(name)
        assert isinstance(parameter, DTensor)
        local: Tensor = _Local.apply(parameter, self._gradient(name, parameter))
        return local.narrow(*self.used[name]) if name in self.used else local

    def _gradient(self, name: str, parameter: DTensor) -> Any:
        """Returns what the gradient's DTensor is made with. Making it takes longer than all else in :meth:`local`."""
        own = spec_of(parameter)
        made_of, made = self._gradients.get(name, (None, None))
        if made_of is not own:
            inner = [Partial()] if name in self.partial else parameter.placements[1:]
            made = spec_of(parameter, (Partial(), *inner))
            self._gradients[name] = own, made
        return made


class _Local(Function):
    """Does the same as ``DTensor.to_local`` in less than half the time, which matters to small models."""

    @staticmethod
    def forward(ctx: Any, parameter: DTensor, spec: Any) -> Tensor:
        ctx.spec = spec
        return local_tensor(parameter).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return DTensor(grads[0].contiguous(), ctx.spec, requires_grad=False), None


def partial_parameters(root: nn.Module) -> set[nn.Parameter]:
    """Returns the parameters below ``root`` whose gradients must be summed over the tensor group as well."""
    return {
        module.get_parameter(name)
        for module in root.modules()
        if isinstance(module, ShardedModule)
        for name in module.partial
    }


def fused_parameters(root: nn.Module) -> dict[nn.Parameter, Fused]:
    """Returns the parameters below ``root`` that hold several matrices, and how."""
    return {
        module.get_parameter(name): spec.fused
        for module in root.modules()
        if isinstance(module, ShardedModule)
        for name, spec in module.specs.items()
        if spec.fused is not None
    }


def decay_groups(root: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Returns the parameters below ``root`` that weight decay applies to, and the others.

    A sharded parameter's specification decides, any other's name, see :func:`tedlab.spec.decayed_by_name`.
    """
    stated = {
        module.get_parameter(name): spec.decayed
        for module in root.modules()
        if isinstance(module, ShardedModule)
        for name, spec in module.specs.items()
    }
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for name, parameter in root.named_parameters():
        groups[not stated.get(parameter, decayed_by_name(name))].append(parameter)
    return groups


Locals = list[tuple[ShardedModule, dict[str, Tensor]]]


def locals_of(root: nn.Module) -> Locals:
    """Returns the plain tensors of all modules below ``root``, see :meth:`ShardedModule.local`."""
    modules = [module for module in root.modules() if isinstance(module, ShardedModule)]
    return [(module, {name: module.local(name) for name in module.specs}) for module in modules]


@contextmanager
def localised(root: nn.Module, plain: Locals | None = None) -> Iterator[None]:
    """Lets modules use plain tensors as parameters inside the context: the compiler cannot keep a DTensor's mesh.

    Args:
        root: The module.
        plain: What :func:`locals_of` has returned for it, if it need not be made again.
    """
    plain = locals_of(root) if plain is None else plain
    for module, tensors in plain:
        module.substitutes.update(tensors)  # setting an attribute of a module takes long
    try:
        yield
    finally:
        for module, _ in plain:
            module.substitutes.clear()


def initialize(root: nn.Module, seed: int, factors: Mapping[str, float] = MappingProxyType({})) -> None:
    """Fills every sharded parameter below ``root`` with its initial values.

    A value depends on the seed, the parameter's name relative to ``root``, its global position, and, for parameters
    of three dimensions, the index along the first (the expert), but never on the layout. No more than 4 MiB of values
    outside the process's own shard exist at any time.

    Args:
        root: The module.
        seed: The seed.
        factors: Factors on the standard deviations of initial values, by parameters' names; 1 where there is none.
    """
    named = root.named_modules()
    layers = [(prefix, module) for prefix, module in named if isinstance(module, ShardedModule)]
    every = [(f"{prefix}.{name}", layer, name) for prefix, layer in layers for name in layer.specs]
    shards = [layer.get_parameter(name).detach() for _, layer, name in every]
    first = not dist.is_initialized() or dist.get_rank() == 0
    total = sum(shard.to_local().numel() for shard in shards if isinstance(shard, DTensor))
    with advancing("initial weights", total, disable=not first) as advance:
        for (key, layer, name), shard in zip(every, shards, strict=True):
            assert isinstance(shard, DTensor)
            init = layer.specs[name].init
            _fill(shard, replace(init, std=init.std * factors.get(key, 1.0)), f"{seed}/{key}", advance)


def _fill(parameter: DTensor, init: Init, key: str, advance: Advance) -> None:
    local = parameter.to_local()
    if init.std == 0.0:
        local.fill_(init.mean)
        advance(local.numel())
        return
    starts = [0] * parameter.dim()
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            index = parameter.device_mesh.get_local_rank(axis)
            starts[placement.dim] = index * local.shape[placement.dim]
    if parameter.dim() == 3:
        for i, matrix in enumerate(local):
            _fill_matrix(matrix, parameter.shape[1:], starts[1:], init, f"{key}[{starts[0] + i}]", advance)
    else:
        _fill_matrix(local, parameter.shape, starts, init, key, advance)


def _fill_matrix(
    local: Tensor, shape: Sequence[int], starts: Sequence[int], init: Init, key: str, advance: Advance
) -> None:
    """Draws the rows of a matrix block by block, each block from its own seed, and keeps those of this shard."""
    rows, columns = shape
    first, last = starts[0], starts[0] + local.shape[0]
    height = max(1, _BLOCK_ELEMENTS // columns)
    for block in range(first // height, -(-last // height)):
        top = block * height
        # Drawing on the CPU gives the same numbers whatever the default device is.
        generator = torch.Generator("cpu").manual_seed(seed_of(f"{key}/{block}"))
        values = torch.randn(min(height, rows - top), columns, generator=generator, dtype=torch.float32, device="cpu")
        kept = values[max(first - top, 0) : last - top, starts[1] : starts[1] + local.shape[1]]
        start = max(top - first, 0)
        local[start : start + kept.shape[0]] = kept * init.std + init.mean
        advance(kept.numel())


def seed_of(key: str) -> int:
    """Returns the seed of a generator that is used for one purpose alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
