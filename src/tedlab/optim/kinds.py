"""Checks which optimizers can be sharded: those that step each element by itself, and those that need whole matrices.

An element-wise optimizer steps flat pieces of memory that hold parts of several parameters. A matrix optimizer needs
each matrix whole between two element-wise parts, see :class:`MatrixOptimizer`.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

KNOWN = (  # torch's element-wise optimizers
    *(optim.Adam, optim.AdamW, optim.SGD, optim.RMSprop, optim.Adagrad, optim.Adadelta),
    *(optim.Adamax, optim.NAdam, optim.RAdam, optim.ASGD, optim.Rprop),
)
_PARTS = ("direct", "orthogonalise", "apply", "precision")  # methods of a matrix optimizer


class MatrixOptimizer(Protocol):
    """An optimizer whose parameter groups with ``matrix`` hold matrices, each of which it needs whole for a moment.

    Its class says ``matrixwise = True``. It steps the groups without ``matrix`` element-wise, by ``step()``; a
    parameter of three dimensions is a stack of matrices. The step of a matrix is ``direct``, then ``orthogonalise``,
    then ``apply``, of which the first and last see flat pieces, and the other a whole matrix.
    """

    param_groups: list[dict[str, Any]]

    def direct(self, piece: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Updates the state of a piece, element-wise, and returns the direction in which it would go."""
        ...

    def orthogonalise(self, matrix: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Returns the update (rows, columns) that whole matrices (rows, columns) of directions become."""
        ...

    def apply(self, piece: Tensor, update: Tensor, group: Mapping[str, Any]) -> None:
        """Steps a piece in place, element-wise."""
        ...

    def precision(self, dtype: torch.dtype, group: Mapping[str, Any]) -> torch.dtype:
        """Returns the dtype in which directions and updates of weights of this dtype travel between processes."""
        ...


def is_matrixwise(optimizer: type[Optimizer]) -> bool:
    """Tells whether an optimizer's class itself says that it is a :class:`MatrixOptimizer`."""
    return vars(optimizer).get("matrixwise") is True


def check_kind(optimizer: type[Optimizer], options: Mapping[str, Any]) -> None:
    """Checks that an optimizer can be sharded.

    torch's element-wise optimizers are known. Any other class, even a subclass of theirs, must itself say
    ``elementwise = True`` or ``matrixwise = True``: one that takes a norm over a layer (LAMB, LARS) would take it of a
    piece, and silently train wrongly.

    Args:
        optimizer: Exact class of the optimizer.
        options: Arguments of its constructor, or one of its parameter groups.

    Raises:
        ValueError: If the optimizer is any other, or ``differentiable`` is set; the message says what would work.
    """
    name = optimizer.__qualname__
    if is_matrixwise(optimizer):
        missing = [part for part in _PARTS if not callable(getattr(optimizer, part, None))]
        if missing:
            raise ValueError(
                f"{name} says matrixwise = True, but has no {', '.join(missing)}; a matrix optimizer has the methods "
                "of tedlab.optim.MatrixOptimizer"
            )
    elif optimizer is optim.Muon:
        raise ValueError(
            f"torch.optim.{name} needs whole matrices, which its state would be cut from, and steps nothing else. Use "
            "tedlab.optim.Muon (optim=muon), which gathers each matrix, and steps the other parameters by AdamW"
        )
    elif optimizer not in KNOWN and vars(optimizer).get("elementwise") is not True:
        raise ValueError(
            f"{name} is not known to update each element by itself, so its state cannot be sharded in flat pieces. Use "
            f"an element-wise optimizer of torch ({', '.join(sorted(c.__name__ for c in KNOWN))}), or "
            f"tedlab.optim.Muon; if {name} is element-wise, its class must say so: elementwise = True; if it needs "
            "each matrix whole: matrixwise = True, with the methods of tedlab.optim.MatrixOptimizer"
        )
    if options.get("differentiable"):
        raise ValueError(
            f"{name} with differentiable=True would keep the graph of its step, which sharding cuts; leave that out"
        )
