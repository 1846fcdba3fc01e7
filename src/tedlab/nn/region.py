"""The entry and exit of a tensor-parallel layer, and the form of activations outside.

Inside, every tensor rank computes its part of each token's features. Outside, all hold all activations
(``ReplicatedRegion``), or each holds the activations of its own positions (``SequenceRegion``, Korthikanti et al. 2022,
§4.2.2). Activations are sent in the dtype that matrix products are computed in.
"""

from typing import Protocol

from torch import Tensor

from tedlab.comm import Collectives, copy_to, gather_to, reduce_from, scatter_from, to_compute_dtype
from tedlab.spec import Layout, Number, Site, Sites
from tedlab.topology import Topology

_POSITIONS = 1  # the dimension of (B, S, H) that sequence parallelism divides


class TensorRegion(Protocol):
    """The entry and exit of a tensor-parallel layer."""

    def enter(self, x: Tensor) -> Tensor:
        """Maps activations outside to (B, S, H), whole on every tensor rank."""
        ...

    def leave(self, partial: Tensor, bias: Tensor | None = None) -> Tensor:
        """Sums each rank's part (B, S, H), adds a bias (H,) if given, and returns activations outside."""
        ...


class ReplicatedRegion:
    """Megatron-LM's f and g: every tensor rank holds the same (B, S, H) outside."""

    def __init__(self, comm: Collectives, name: str) -> None:
        self.comm, self.name = comm, name

    def enter(self, x: Tensor) -> Tensor:
        return copy_to(to_compute_dtype(x), self.comm, "tensor", f"{self.name}.copy")

    def leave(self, partial: Tensor, bias: Tensor | None = None) -> Tensor:
        y = reduce_from(partial, self.comm, "tensor", f"{self.name}.reduce")
        return y if bias is None else y + bias.to(y.dtype)  # after the sum, so that it is added once


class SequenceRegion:
    """Tensor rank i of T holds the i-th slice of every sample's positions outside, (B, S/T, H)."""

    def __init__(self, comm: Collectives, name: str) -> None:
        self.comm, self.name = comm, name

    def enter(self, x: Tensor) -> Tensor:
        return gather_to(to_compute_dtype(x), self.comm, "tensor", f"{self.name}.gather", _POSITIONS)

    def leave(self, partial: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None else bias.to(partial.dtype)
        return scatter_from(partial, self.comm, "tensor", f"{self.name}.reduce", _POSITIONS, bias)


def enter_sites(name: str, width: int, layout: Layout) -> Sites:
    """Returns the collectives of a region's entry, for activations of ``width`` features."""
    if layout.sequence:
        forward = Site(f"{name}.gather", "all_gather", "tensor", width, replicated=True)
        return Sites((forward,), (Site(forward.tag, "reduce_scatter", "tensor", width),))
    return Sites((), (Site(f"{name}.copy", "all_reduce", "tensor", width),))


def leave_sites(name: str, width: int, layout: Layout, dtype: Number = "compute") -> Sites:
    """Returns the collectives of a region's exit, for activations of ``width`` features."""
    if layout.sequence:
        forward = Site(f"{name}.reduce", "reduce_scatter", "tensor", width, dtype=dtype)
        return Sites((forward,), (Site(forward.tag, "all_gather", "tensor", width, dtype=dtype),))
    return Sites((Site(f"{name}.reduce", "all_reduce", "tensor", width, dtype=dtype, replicated=True),))


def tensor_region(topology: Topology, name: str) -> TensorRegion:
    """Returns the region of a layer; ``name`` begins the tags of its collectives."""
    return (SequenceRegion if topology.sequence_sharded else ReplicatedRegion)(topology.comm, name)
