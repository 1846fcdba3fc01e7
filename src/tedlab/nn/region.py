"""Where a tensor-parallel layer begins and ends, and what activations look like outside.

Inside, every tensor rank computes its part of each token's features. Outside, all hold all activations
(``ReplicatedRegion``), or each holds the activations of its own positions (``SequenceRegion``, Korthikanti et al. 2022,
§4.2.2). What is sent is in the dtype that matrix products are computed in.
"""

from typing import Protocol

from torch import Tensor

from tedlab.comm import Collectives, copy_to, gather_to, reduce_from, scatter_from, to_compute_dtype
from tedlab.spec import Layout, Number, Site, Sites
from tedlab.topology import Topology

_POSITIONS = 1  # the dimension of (B, S, H) that sequence parallelism divides


class TensorRegion(Protocol):
    """A tensor-parallel layer's way in and out."""

    def enter(self, x: Tensor) -> Tensor:
        """Activations outside → (B, S, H), whole on every tensor rank."""
        ...

    def leave(self, partial: Tensor, bias: Tensor | None = None) -> Tensor:
        """Each rank's part of a sum (B, S, H) → the sum, plus a bias (H,), as activations outside."""
        ...


class ReplicatedRegion:
    """Megatron-LM's f and g: outside, every tensor rank holds the same (B, S, H)."""

    def __init__(self, comm: Collectives, name: str) -> None:
        self.comm, self.name = comm, name

    def enter(self, x: Tensor) -> Tensor:
        return copy_to(to_compute_dtype(x), self.comm, "tensor", f"{self.name}.copy")

    def leave(self, partial: Tensor, bias: Tensor | None = None) -> Tensor:
        y = reduce_from(partial, self.comm, "tensor", f"{self.name}.reduce")
        return y if bias is None else y + bias.to(y.dtype)  # once, after the sum


class SequenceRegion:
    """Outside, tensor rank i of T holds (B, S/T, H): the i-th slice of every sample's positions."""

    def __init__(self, comm: Collectives, name: str) -> None:
        self.comm, self.name = comm, name

    def enter(self, x: Tensor) -> Tensor:
        return gather_to(to_compute_dtype(x), self.comm, "tensor", f"{self.name}.gather", _POSITIONS)

    def leave(self, partial: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None else bias.to(partial.dtype)
        return scatter_from(partial, self.comm, "tensor", f"{self.name}.reduce", _POSITIONS, bias)


def enter_sites(name: str, width: int, layout: Layout) -> Sites:
    """The collectives of a region's way in, for activations of ``width`` features."""
    if layout.sequence:
        forward = Site(f"{name}.gather", "all_gather", "tensor", width, replicated=True)
        return Sites((forward,), (Site(forward.tag, "reduce_scatter", "tensor", width),))
    return Sites((), (Site(f"{name}.copy", "all_reduce", "tensor", width),))


def leave_sites(name: str, width: int, layout: Layout, dtype: Number = "compute") -> Sites:
    """Those of its way out."""
    if layout.sequence:
        forward = Site(f"{name}.reduce", "reduce_scatter", "tensor", width, dtype=dtype)
        return Sites((forward,), (Site(forward.tag, "all_gather", "tensor", width, dtype=dtype),))
    return Sites((Site(f"{name}.reduce", "all_reduce", "tensor", width, dtype=dtype, replicated=True),))


def tensor_region(topology: Topology, name: str) -> TensorRegion:
    """The region of a layer; ``name`` begins the tags of its collectives."""
    return (SequenceRegion if topology.sequence_sharded else ReplicatedRegion)(topology.comm, name)
