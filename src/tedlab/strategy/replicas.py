"""What several processes should hold alike is compared, to the last bit: parameters, and the batches of tensor ranks.

Replicas that drift apart are the mistake that no loss shows: a mask that was drawn on one tensor rank alone, a batch
that only one of them read. Each goes on training, on a model that nobody has.
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
_KINDS = get_args(GroupKind)  # also names of the axes of our meshes; a user's may have others


class ReplicaCheck:
    """Compares checksums of parameters between all processes that hold the same, every so many steps.

    Compared are: parameters that tedlab shards, over the groups along which they are not divided; all others over the
    tensor and the data group. Buffers are not: before every step all processes get those of the first.

    A check reads parameters once, takes one all-gather of a few numbers over all processes, and waits for the device
    once.

    Args:
        every: steps between checks; None: there is none.
    """

    def __init__(self, every: int | None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"check_replicas_every is {every}; it counts steps: at least 1, or None for no checks")
        self.every = every
        self._checked: int | None = None  # the step of the last check

    def at_step(self, step: int, module: nn.Module, topology: Topology) -> None:
        """Checks if it is time to; every process is to ask."""
        if self.every is not None and step % self.every == 0:
            self.now(step, module, topology)

    def now(self, step: int, module: nn.Module, topology: Topology) -> None:
        """Checks, unless that was done at this step or is not wanted at all.

        Raises:
            RuntimeError: on every process alike: names the first parameter that differs, the processes, and the step.
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
    """Name, this process's part, and the groups that hold it alike, of every parameter."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            axes = zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True)
            kinds: Any = tuple(axis for axis, placement in axes if axis in _KINDS and isinstance(placement, Replicate))
            yield name, parameter.to_local(), kinds
        else:
            yield name, parameter, ("data", "tensor")


def _gathered(sums: Sequence[Tensor], topology: Topology, kind: GroupKind = "world") -> np.ndarray:
    """(processes of the group, sums), as the host reads them."""
    own = torch.stack(list(sums)).unsqueeze(0)
    return topology.comm.all_gather(own, kind, tag="replicas.checksum", phase="check").cpu().numpy()


def _apart(column: np.ndarray, kinds: Kinds, topology: Topology) -> tuple[int, int, GroupKind] | None:
    """The first two processes of one group that have different values, and the kind of the group."""
    for kind in kinds:
        first = _first_of_group(topology.degrees, kind)
        (others,) = np.nonzero(column != column[first])
        if len(others):
            return int(first[others[0]]), int(others[0]), kind
    return None


@functools.cache
def _first_of_group(degrees: ParallelDegrees, kind: GroupKind) -> np.ndarray:
    """For each process the first one of its group."""
    return np.array([degrees.groups(rank)[kind][0] for rank in range(degrees.world_size)])


# ---- batches -----------------------------------------------------------------------------------------------------


def check_batch(batch: Any, stage: str, topology: Topology, alone: bool = False) -> None:
    """Compares a batch between tensor ranks.

    Compared are tensors, arrays, numbers and text in any nesting of sequences, mappings and data classes; of anything
    else, its type.

    Args:
        batch: on the device.
        stage: where it is from, for the message.
        topology: where this process stands.
        alone: whether each tensor group is to do so for itself, where others may have no batch at all.

    Raises:
        ValueError: on every process alike (``alone``: on those of the group): names two that do not agree.
    """
    if topology.comm.size("tensor") == 1:
        return
    tensors: list[Tensor] = []
    form = "\n".join(_described(batch, tensors))
    own = int.from_bytes(hashlib.blake2b(form.encode(), digest_size=8).digest(), "little", signed=True)
    form_sum = torch.tensor(own, dtype=torch.int64, device=topology.device)
    sums = [form_sum, checksum(tensors, topology.device)]
    table = _gathered(sums, topology, "tensor" if alone else "world")
    if alone:  # as if the others agreed
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
    """What there is, part by part; values of tensors and arrays are left to be summed."""
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
    """Gives every process as many threads on its CPU as the one that has fewest. Collective.

    A sum over more threads is rounded otherwise, and replicas would drift apart. Lightning's launcher leaves the first
    process with fewer threads than those that it starts, and nodes may have different numbers of cores.
    """
    threads = torch.tensor(torch.get_num_threads())
    dist.all_reduce(threads, dist.ReduceOp.MIN)
    torch.set_num_threads(int(threads))
