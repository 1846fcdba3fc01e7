"""Which process does what: the two device meshes built from the parallel degrees, and their process groups.

Two meshes arrange the same processes (paper §3):

- ``dense``:  data × tensor, for attention, embeddings, norms, routers and dense feed-forward layers;
- ``expert``: expert_data × expert × expert_tensor, for experts.

The degrees say which ranks are in a group (see ``degrees.py``). In the paper ``expert_tensor`` is ``tensor``, and both
meshes share its groups; a folded layout divides experts by width over other groups than dense layers.
"""

from collections.abc import Sequence
from copy import copy
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tedlab._compat.torch import set_timeout
from tedlab.comm import Collectives, GroupKind, Recomputation, SlotAgreement, Whereabouts
from tedlab.config import CommOptions
from tedlab.context import BatchContext
from tedlab.degrees import ParallelDegrees
from tedlab.spec import Layout

_EXPERT_AXES: tuple[GroupKind, ...] = ("expert_data", "expert", "expert_tensor")
_BY_NODE: tuple[GroupKind, ...] = ("expert_in_node", "expert_between_nodes")


class Topology:
    """The meshes of this process, and the collectives over their groups.

    It needs an initialised default process group of ``degrees.world_size`` processes.

    Args:
        degrees: The parallel degrees.
        device: The device that holds this process's tensors.
        options: The toggles of communication.
        timeout: The timeout of collectives in every group; None keeps torch's.
        place: The record in which this process notes what it waits in.

    Attributes:
        degrees: The parallel degrees.
        options: The toggles of communication.
        dense: The mesh (data, tensor).
        expert: The mesh (expert_data, expert, expert_tensor).
        comm: The object that runs every collective of the model, the strategy and the optimizer.
        own_positions: Whether each tensor rank has positions of its own in any layout, see :meth:`sliced`.
        recomputation: The counters of activation checkpointing.
        slots: The check that processes send each other equally many slots.
        context: The place of the current micro-batch in the run.
        device: The device that holds this process's tensors.
    """

    def __init__(
        self,
        degrees: ParallelDegrees,
        device: torch.device | str = "cpu",
        options: CommOptions | None = None,
        timeout: timedelta | None = None,
        place: Whereabouts | None = None,
    ) -> None:
        if dist.get_world_size() != degrees.world_size:
            raise ValueError(
                f"degrees are for {degrees.world_size} processes, but {dist.get_world_size()} were started"
            )
        self.degrees, self.own_positions = degrees, False
        self.options = options or CommOptions()
        self.recomputation = Recomputation()
        self.device = torch.device(device)
        self.context = BatchContext(self.device)
        self.dense: DeviceMesh = init_device_mesh(
            self.device.type, (degrees.data, degrees.tensor), mesh_dim_names=("data", "tensor")
        )
        assert dist.group.WORLD is not None
        groups: dict[GroupKind, dist.ProcessGroup] = {
            "tensor": self.dense.get_group("tensor"),
            "data": self.dense.get_group("data"),
            "world": dist.group.WORLD,
        }
        ranks = torch.empty([degrees.sizes[kind] for kind in _EXPERT_AXES], dtype=torch.int)
        for rank in range(degrees.world_size):
            coordinates = degrees.coordinates(rank)
            ranks[tuple(coordinates[kind] for kind in _EXPERT_AXES)] = rank
        for axis, kind in enumerate(_EXPERT_AXES):
            if kind == "expert_tensor" and not degrees.folded:
                groups[kind] = groups["tensor"]  # the same processes
            else:
                members = ranks.movedim(axis, -1).flatten(0, 1).tolist()
                options = _urgent() if kind == "expert" else None
                groups[kind], _ = dist.new_subgroups_by_enumeration(members, pg_options=options, group_desc=kind)
        self.expert: DeviceMesh = DeviceMesh.from_group(
            [groups[kind] for kind in _EXPERT_AXES], self.device.type, ranks, mesh_dim_names=_EXPERT_AXES
        )
        for kind in _BY_NODE if self.layout.nodes > 1 else ():
            every = dict.fromkeys(self.layout.groups(rank)[kind] for rank in range(degrees.world_size))
            members = [list(group) for group in every]
            groups[kind], _ = dist.new_subgroups_by_enumeration(members, pg_options=_urgent(), group_desc=kind)
        if timeout is not None:
            for group in set(groups.values()):  # meshes use torch's timeout, 30 minutes for gloo
                set_timeout(timeout, group)
        self.comm = Collectives(groups, place)
        self.slots = SlotAgreement(self.comm, degrees.in_step)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Topology":
        """Returns itself, since a copy of a model belongs to the same process."""
        return self

    def mesh_of(self, axes: Sequence[str]) -> DeviceMesh:
        """Returns the mesh with these axes; versions before folding called the last axis of experts ``tensor``."""
        return self.expert if axes[0] == _EXPERT_AXES[0] else self.dense

    @property
    def sequence_sharded(self) -> bool:
        """Whether tensor ranks divide the activations that a layer gets by position."""
        return self.layout.sequence

    @property
    def layout(self) -> Layout:
        """The layout that layers' specifications are computed for."""
        return Layout(self.degrees, self.options, self.own_positions)

    def sliced(self) -> "Topology":
        """Returns the same topology for layers of which each tensor rank gets its own positions in any layout."""
        inside = copy(self)
        inside.own_positions = True
        return inside

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> "Topology":
        """Returns the topology of one process, for tools without a launcher; starts a process group if needed."""
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if torch.device(device).type == "cuda":
            torch.cuda.init()  # otherwise torch's mesh chooses a device and warns
        return cls(ParallelDegrees(1), device)


def _urgent() -> Any:
    """Returns options of a group whose collectives go first on a GPU, as exchanges do before reductions of gradients.

    Streams of NCCL have two priorities, of which groups otherwise have the lower one. Others have none: None.
    """
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    return options
