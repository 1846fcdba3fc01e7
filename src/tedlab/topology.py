"""Which process does what: parallel degrees, the two device meshes built from them, and the groups these hold.

This is the only module that knows about ranks. The same processes are seen through two meshes (paper §3):

- ``dense``:  data × tensor, for attention, embeddings, norms, routers and dense feed-forward layers;
- ``expert``: expert_data × expert × tensor, for experts; ``data`` = expert_data × expert.

The tensor index varies fastest, then expert, then expert_data, so that tensor groups sit inside a node.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tedlab._compat.torch import set_timeout, unflatten
from tedlab.comm import Collectives, GroupKind, Recomputation, SlotAgreement, Whereabouts
from tedlab.config import CommOptions
from tedlab.degrees import ParallelDegrees
from tedlab.spec import Layout


class Topology:
    """The meshes of this process, and the collectives over their groups.

    Needs an initialised default process group of ``degrees.world_size`` processes.

    Args:
        degrees: the parallel degrees.
        device: where this process keeps its tensors.
        options: the toggles of communication.
        timeout: after which a collective fails, in every group; None: torch's.
        place: where this process notes what it waits in.

    Attributes:
        degrees: the parallel degrees.
        options: the toggles of communication.
        dense: mesh (data, tensor).
        expert: mesh (expert_data, expert, tensor).
        comm: every collective of the model, the strategy and the optimizer goes through this object.
        recomputation: counters of activation checkpointing.
        slots: see to it that processes exchange as many slots as they expect of each other.
        device: where this process keeps its tensors.
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
        self.degrees = degrees
        self.options = options or CommOptions()
        self.recomputation = Recomputation()
        self.device = torch.device(device)
        self.dense: DeviceMesh = init_device_mesh(
            self.device.type, (degrees.data, degrees.tensor), mesh_dim_names=("data", "tensor")
        )
        sizes = degrees.expert_data, degrees.expert
        self.expert: DeviceMesh = unflatten(self.dense, 0, sizes, ("expert_data", "expert"))
        assert dist.group.WORLD is not None
        groups: dict[GroupKind, dist.ProcessGroup] = {
            "tensor": self.dense.get_group("tensor"),
            "data": self.dense.get_group("data"),
            "expert": self.expert.get_group("expert"),
            "expert_data": self.expert.get_group("expert_data"),
            # In the paper experts are sharded over the attention's tensor group; folding would change this line.
            "expert_tensor": self.expert.get_group("tensor"),
            "world": dist.group.WORLD,
        }
        if timeout is not None:
            for group in set(groups.values()):  # a mesh makes its groups with torch's, 30 minutes of gloo's
                set_timeout(timeout, group)
        self.comm = Collectives(groups, place)
        self.slots = SlotAgreement(self.comm)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Topology":
        """Itself: a copy of a model stands in the same place as the model."""
        return self

    def mesh_of(self, axes: Sequence[str]) -> DeviceMesh:
        """The mesh that has these axes."""
        return next(mesh for mesh in (self.dense, self.expert) if mesh.mesh_dim_names == tuple(axes))

    @property
    def sequence_sharded(self) -> bool:
        """Whether each tensor rank holds its own positions of the activations between layers."""
        return self.layout.sequence

    @property
    def layout(self) -> Layout:
        """What specifications are asked with."""
        return Layout(self.degrees, self.options)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> "Topology":
        """A world of one process, for tools that use a model without a launcher. Starts a process group if needed."""
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if torch.device(device).type == "cuda":
            torch.cuda.init()  # else torch's mesh would choose a device, and warn
        return cls(ParallelDegrees(1), device)
