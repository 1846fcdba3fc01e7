"""What a layer states about itself, beside its forward: the facts that predictions, the optimizer and CAC work from.

A specification never runs a layer and is never run by one, so that a prediction and a measurement are independent.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import ClassVar, Literal

from tedlab.degrees import GroupKind, ParallelDegrees


@dataclass(frozen=True)
class Init:
    """Initial values: ``mean`` + ``std`` · standard normal."""

    mean: float = 0.0
    std: float = 0.0


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter of the whole model, and how processes divide it.

    Attributes:
        name: within its layer.
        shape: global shape.
        init: initial values.
        divided: mesh axis → the dimension that is divided along it; it is replicated along the other axes.
        mesh: ``dense`` or ``expert``, see ``topology.py``. Gradients are summed over its first axis.
        own_tokens: whether each tensor rank uses it for its own tokens where the sequence is sharded. Its gradients are
            then to be summed over the tensor group, too.
        decayed: whether weight decay pulls it towards zero.
    """

    name: str
    shape: tuple[int, ...]
    init: Init = Init()
    divided: Mapping[str, int] = field(default_factory=dict)
    mesh: Literal["dense", "expert"] = "dense"
    own_tokens: bool = False
    decayed: bool = True

    @property
    def group(self) -> GroupKind:
        """The group that its gradient is summed over."""
        return "data" if self.mesh == "dense" else "expert_data"

    def parts(self, degrees: ParallelDegrees) -> int:
        """How many parts it is divided into."""
        return prod(getattr(degrees, axis) for axis in self.divided)

    def elements(self, degrees: ParallelDegrees) -> int:
        """How many elements one process holds."""
        return prod(self.shape) // self.parts(degrees)


def decayed_by_name(name: str) -> bool:
    """Whether weight decay applies to a parameter that has no specification: not to biases and norms."""
    return not ("bias" in name or "norm" in name)


class Spec:
    """Base of specifications: frozen dataclasses whose fields are the arguments of the layer, but for its topology.

    Attributes:
        parts: names of the layers that it consists of, in the order of their parameters; each may be None.
    """

    parts: ClassVar[tuple[str, ...]] = ()

    def children(self) -> Iterator[tuple[str, "Spec"]]:
        """Its parts, by name."""
        return ((name, part) for name in self.parts if (part := getattr(self, name)) is not None)

    def own(self) -> Iterator[ParameterSpec]:
        """Parameters that belong to none of its parts."""
        return iter(())

    def parameters(self) -> Iterator[ParameterSpec]:
        """All parameters, in the order of ``named_parameters()`` and by the same names."""
        yield from self.own()
        for name, part in self.children():
            for parameter in part.parameters():
                yield replace(parameter, name=f"{name}.{parameter.name}")
