"""Stores sharded tensors that belong to neither the model nor an optimizer, such as a callback's averaged weights.

One process writes such state, and it holds only a part of each sharded tensor. So these tensors are taken out and
stored like the model's, and a note in their place lets another layout allocate them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, empty

_NOTE = "tedlab_sharded_tensor"


def detach(state: dict[str, Any]) -> dict[str, DTensor]:
    """Takes sharded tensors out of nested dictionaries and leaves notes in their place.

    Args:
        state: Modified in place; nested dictionaries that hold sharded tensors are replaced by copies.

    Returns:
        The tensors to store, by name.

    Raises:
        TypeError: If a sharded tensor is in a list or another container, where loading would not find it.
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
    """Inverts :func:`detach`: replaces each note by an uninitialised tensor.

    Args:
        state: Modified in place.
        mesh_of: Returns this process's mesh with the given axes.

    Returns:
        The same tensors by name, to be filled from the checkpoint.
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
