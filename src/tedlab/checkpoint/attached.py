"""Sharded tensors in a checkpoint that are neither the model's nor an optimizer's: averaged weights of a callback, say.

All such things are written by one process, which has a part of a sharded tensor only. So these are taken out and stored
as the model's are, with a note in their place from which another layout can make room.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, empty

_NOTE = "tedlab_sharded_tensor"


def detach(state: dict[str, Any]) -> dict[str, DTensor]:
    """Takes sharded tensors out of nested dictionaries and leaves notes.

    Args:
        state: modified in place, down to the dictionaries that hold sharded tensors, which are replaced.

    Returns:
        The tensors by name, to be stored.

    Raises:
        TypeError: if one is in a list or another container, where it would not be found again.
    """
    found: dict[str, DTensor] = {}
    for key, value in state.items():
        state[key] = _detached(value, key, found)
    return found


def _detached(value: Any, path: str, found: dict[str, DTensor]) -> Any:
    if isinstance(value, DTensor):
        found[path] = value
        names, axes = value.device_mesh.mesh_dim_names or (), value.placements
        shards = {name: place.dim for name, place in zip(names, axes, strict=True) if isinstance(place, Shard)}
        note = {"axes": list(names), "shards": shards, "shape": list(value.shape), "dtype": str(value.dtype)}
        return {_NOTE: path, **note}
    if isinstance(value, (list, tuple, set)) and _holds_sharded(value):
        raise TypeError(
            f"A checkpoint cannot hold the sharded tensors in {path}, a {type(value).__name__}: put them in a "
            "dictionary, by name"
        )
    if isinstance(value, Mapping) and _holds_sharded(value):
        return {key: _detached(item, f"{path}/{key}", found) for key, item in value.items()}
    return value


def _holds_sharded(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_sharded(item) for item in value.values())
    return isinstance(value, DTensor) or (isinstance(value, (list, tuple, set)) and any(map(_holds_sharded, value)))


def attach(state: dict[str, Any], mesh_of: Callable[[list[str]], DeviceMesh]) -> dict[str, DTensor]:
    """The inverse of :func:`detach`: puts a tensor in the place of each note, still to be filled.

    Args:
        state: modified in place.
        mesh_of: the mesh of this process that has these axes.

    Returns:
        The same tensors by name, to be loaded.
    """
    found: dict[str, DTensor] = {}
    for key, value in state.items():
        state[key] = _attached(value, mesh_of, found)
    return found


def _attached(value: Any, mesh_of: Callable[[list[str]], DeviceMesh], found: dict[str, DTensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if _NOTE not in value:
        for key, item in value.items():
            value[key] = _attached(item, mesh_of, found)
        return value
    shards = value["shards"]
    placements = [Shard(shards[axis]) if axis in shards else Replicate() for axis in value["axes"]]
    dtype = getattr(torch, value["dtype"].removeprefix("torch."))
    tensor = empty(*value["shape"], dtype=dtype, device_mesh=mesh_of(value["axes"]), placements=placements)
    found[value[_NOTE]] = tensor
    return tensor
