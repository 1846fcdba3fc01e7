"""Linear layers divided over the tensor group: by output features (column) and by input features (row)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tedlab.comm import matmul_into
from tedlab.nn.region import enter_sites, leave_sites, tensor_region
from tedlab.nn.sharded import ShardedModule
from tedlab.spec import Init, Layout, ParameterSpec, Sites, Spec
from tedlab.topology import Topology


@dataclass(frozen=True)
class ColumnParallelSpec(Spec):
    """Of :class:`ColumnParallelLinear`."""

    in_features: int
    out_features: int
    tag: str
    init: Init
    bias: bool = True

    def own(self) -> Iterator[ParameterSpec]:
        yield ParameterSpec("weight", (self.out_features, self.in_features), self.init, {"tensor": 0})
        if self.bias:
            yield ParameterSpec("bias", (self.out_features,), divided={"tensor": 0}, decayed=False)

    def sites(self, layout: Layout) -> Sites:
        return enter_sites(self.tag, self.in_features, layout)


class ColumnParallelLinear(ShardedModule):
    """``x @ Wᵀ + b`` with the output features divided over the tensor group.

    Args:
        in_features: size of the last dimension of the input.
        out_features: global size of the output; the tensor degree must divide it.
        topology: where this process stands.
        tag: name of the layer in the record of collectives (``<tag>.copy``, in backward; ``<tag>.gather``).
        init: initial weights; the bias starts at zero.
        bias: whether there is one.
    """

    def __init__(
        self, in_features: int, out_features: int, topology: Topology, *, tag: str, init: Init, bias: bool = True
    ) -> None:
        super().__init__()
        self.region = tensor_region(topology, tag)
        self.build(ColumnParallelSpec(in_features, out_features, tag, init, bias), topology)

    def forward(self, x: Tensor) -> Tensor:
        """Activations outside (B, S, in_features) → (B, S, out_features / T), this rank's part."""
        return F.linear(
            self.region.enter(x), self.local("weight"), self.local("bias") if "bias" in self.inits else None
        )


@dataclass(frozen=True)
class RowParallelSpec(Spec):
    """Of :class:`RowParallelLinear`."""

    in_features: int
    out_features: int
    tag: str
    init: Init
    bias: bool = True

    def own(self) -> Iterator[ParameterSpec]:
        yield ParameterSpec("weight", (self.out_features, self.in_features), self.init, {"tensor": 1})
        if self.bias:  # added once, to the sum
            yield ParameterSpec("bias", (self.out_features,), decayed=False)

    def sites(self, layout: Layout) -> Sites:
        return leave_sites(self.tag, self.out_features, layout)


class RowParallelLinear(ShardedModule):
    """``x @ Wᵀ + b`` with the input features divided over the tensor group.

    Args:
        in_features: global size of the input; the tensor degree must divide it.
        out_features: size of the last dimension of the output.
        topology: where this process stands.
        tag: name of the layer in the record of collectives (``<tag>.reduce``, in forward).
        init: initial weights; the bias starts at zero.
        bias: whether there is one.
    """

    def __init__(
        self, in_features: int, out_features: int, topology: Topology, *, tag: str, init: Init, bias: bool = True
    ) -> None:
        super().__init__()
        self.region, self.tag = tensor_region(topology, tag), tag
        self.build(RowParallelSpec(in_features, out_features, tag, init, bias), topology)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, in_features / T), this rank's part → activations outside (B, S, out_features)."""
        return self.region.leave(
            matmul_into(x, self.local("weight").mT, f"{self.tag}.reduce"),
            self.local("bias") if "bias" in self.inits else None,
        )
