"""Compares, to the last bit, what processes should hold alike: parameters, and the batches of tensor ranks.

No loss shows that replicas drift apart, for example because one tensor rank drew another dropout mask or read another
batch: training goes on, but the model is one that no process holds.
"""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from tedlab.checksum import checksum
from tedlab.degrees import GroupKind, ParallelDegrees
from tedlab.topology import Topology

Kinds = tuple[GroupKind, ...]
_KINDS = get_args(GroupKind)  # also the axis names of tedlab's meshes; a user's mesh may have others


class ReplicaCheck:
    """Compares checksums of parameters between all processes that hold the same, every so many steps.

    Parameters that tedlab shards are compared over the groups along which they are not divided, all others over the
    tensor and data groups. So are buffers of tedlab's; before every step all processes get the other buffers of the
    first one.

    A check reads parameters once, takes one all-gather of a few numbers over all processes, and waits for the device
    once.

    Args:
        every: The number of steps between checks; None: no checks.
    """

    def __init__(self, every: int | None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"check_replicas_every is {every}; it counts steps: at least 1, or None for no checks")
        self.every = every
        self._checked: int | None = None  # the step of the last check

    def at_step(self, step: int, module: nn.Module, topology: Topology) -> None:
        """Checks if a check is due at this step. All processes must call this."""
        if self.every is not None and step % self.every == 0:
            self.now(step, module, topology)

    def now(self, step: int, module: nn.Module, topology: Topology) -> None:
        """Checks, unless this step has been checked or checks are off.

        Raises:
            RuntimeError: On all processes; it names the first parameter that differs, two processes, and the step.
        """
        if self.every is None or self._checked == step or topology.degrees.world_size == 1:
            return
        self._checked = step
        by_kinds: dict[Kinds, dict[str, Tensor]] = {}
        for name, tensor, kinds in _replicated(module):
            by_kinds.setdefault(kinds, {})[name] = tensor
        classes = sorted(by_kinds)
        sums = _gathered([checksum(by_kinds[kinds].values(), topology.device) for kinds in classes], topology)
        drifted = [kinds for column, kinds in zip(sums.T, classes, strict=True) if _apart(column, kinds, topology)]
        if drifted:
            suspects = [(n, x, kinds) for n, x, kinds in _replicated(module) if kinds in drifted]
            each = _gathered([checksum([x], topology.device) for _, x, _ in suspects], topology)
            for column, (name, _, kinds) in zip(each.T, suspects, strict=True):
                if apart := _apart(column, kinds, topology):
                    raise RuntimeError(_of_replicas(name, apart, step))


def _of_replicas(name: str, apart: tuple[int, int, GroupKind], step: int) -> str:
    one, other, kind = apart
    return (
        f"Replicas have drifted apart: after step {step}, '{name}' of process {other} differs from that of process "
        f"{one}, though the {kind} group holds it alike. They read other batches, drew other random numbers, were "
        "changed on one process alone, or compute in an order that is not reproducible. "
        "TEDStrategy(check_replicas_every=None) does not look."
    )


def _replicated(module: nn.Module) -> Iterator[tuple[str, Tensor, Kinds]]:
    """Yields the name of every parameter and buffer of tedlab's, this process's part, and the groups that hold it."""
    buffers = ((name, buffer) for name, buffer in module.named_buffers() if isinstance(buffer, DTensor))
    for name, parameter in (*module.named_parameters(), *buffers):
        if isinstance(parameter, DTensor):
            axes = zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True)
            kinds: Any = tuple(axis for axis, placement in axes if axis in _KINDS and isinstance(placement, Replicate))
            yield name, parameter.to_local(), kinds
        else:
            yield name, parameter, ("data", "tensor")


def _gathered(sums: Sequence[Tensor], topology: Topology, kind: GroupKind = "world") -> np.ndarray:
    """Returns the sums of all processes of the group on the host, (processes, sums)."""
    own = torch.stack(list(sums)).unsqueeze(0)
    return topology.comm.all_gather(own, kind, tag="replicas.checksum", phase="check").cpu().numpy()


def _apart(column: np.ndarray, kinds: Kinds, topology: Topology) -> tuple[int, int, GroupKind] | None:
    """Returns the first two processes of one group with different values, and the kind of the group, or None."""
    for kind in kinds:
        first = _first_of_group(topology.degrees, kind)
        (others,) = np.nonzero(column != column[first])
        if len(others):
            return int(first[others[0]]), int(others[0]), kind
    return None


@functools.cache
def _first_of_group(degrees: ParallelDegrees, kind: GroupKind) -> np.ndarray:
    """Returns the first process of each process's group, (processes,)."""
    return np.array([degrees.groups(rank)[kind][0] for rank in range(degrees.world_size)])


# ---- batches -----------------------------------------------------------------------------------------------------


def check_batch(batch: Any, stage: str, topology: Topology, alone: bool = False) -> None:
    """Compares a batch between tensor ranks.

    It compares tensors, arrays, numbers and text in any nesting of sequences, mappings and data classes, and only the
    type of anything else.

    Args:
        batch: The batch, on the device.
        stage: The loop that it belongs to, for the message.
        topology: The topology of this process.
        alone: Whether each tensor group compares for itself, because others may have no batch.

    Raises:
        ValueError: On all processes (with ``alone``, on those of the group); the message names two that disagree.
    """
    if topology.comm.size("tensor") == 1:
        return
    tensors: list[Tensor] = []
    form = "\n".join(_described(batch, tensors))
    own = int.from_bytes(hashlib.blake2b(form.encode(), digest_size=8).digest(), "little", signed=True)
    form_sum = torch.tensor(own, dtype=torch.int64, device=topology.device)
    sums = [form_sum, checksum(tensors, topology.device)]
    table = _gathered(sums, topology, "tensor" if alone else "world")
    if alone:  # the other groups count as agreeing
        members = topology.degrees.groups(topology.comm.rank("world"))["tensor"]
        own_group, table = table, np.zeros((topology.degrees.world_size, len(sums)), table.dtype)
        table[list(members)] = own_group
    for column in table.T:
        if apart := _apart(column, ("tensor",), topology):
            one, other, _ = apart
            raise ValueError(
                f"Tensor ranks compute on one batch, but the first {stage} batch of process {other} is not that of "
                f"process {one}. Divide samples by trainer.strategy.distributed_sampler_kwargs rather than by process, "
                "and let what a data set draws come from the generators of random, numpy.random or torch, which are "
                "seeded alike on tensor ranks, not from one that is seeded by time, process or chance."
            )


def _described(item: Any, tensors: list[Tensor]) -> Iterator[str]:
    """Yields a description of each part of an item, and appends tensors and arrays to ``tensors`` for a checksum."""
    if isinstance(item, np.ndarray) and item.dtype.kind in "biufc":
        item = torch.from_numpy(item)
    if isinstance(item, Tensor):
        yield f"{item.dtype} {tuple(item.shape)} {item.layout}"
        if item.layout is torch.strided and not item.is_nested:
            tensors.append(item)
    elif item is None or isinstance(item, str | bytes | int | float | complex | np.generic):
        yield repr(item)
    elif isinstance(item, Mapping):
        for key, value in item.items():
            yield f"key {key!r}"
            yield from _described(value, tensors)
    elif isinstance(item, list | tuple):
        yield f"{type(item).__name__} of {len(item)}"
        for value in item:
            yield from _described(value, tensors)
    elif is_dataclass(item):
        for entry in fields(item):
            yield f"field {entry.name}"
            yield from _described(getattr(item, entry.name), tensors)
    else:
        yield type(item).__qualname__


def agree_on_threads() -> None:
    """Sets every process's number of CPU threads to the smallest of all processes. Collective.

    With another number of threads sums are rounded differently, and replicas would drift apart. Lightning's launcher
    leaves the first process with fewer threads than those that it starts, and nodes may differ in their cores.
    """
    threads = torch.tensor(torch.get_num_threads())
    dist.all_reduce(threads, dist.ReduceOp.MIN)
    torch.set_num_threads(int(threads))
