"""Checks which optimizers can step flat pieces of memory that hold parts of several parameters."""

from collections.abc import Mapping
from typing import Any

from torch import optim
from torch.optim import Optimizer

KNOWN = (  # torch's element-wise optimizers
    *(optim.Adam, optim.AdamW, optim.SGD, optim.RMSprop, optim.Adagrad, optim.Adadelta),
    *(optim.Adamax, optim.NAdam, optim.RAdam, optim.ASGD, optim.Rprop),
)


def check_elementwise(optimizer: type[Optimizer], options: Mapping[str, Any]) -> None:
    """Checks that shards can be stepped as flat pieces: each element from its own gradient and state, and scalars.

    torch's element-wise optimizers are known. Any other class, even a subclass of theirs, must itself say
    ``elementwise = True``: one that takes a norm over a layer (LAMB, LARS) or a product of matrices (Muon) would take
    it of a piece, and silently train wrongly.

    Args:
        optimizer: Exact class of the optimizer.
        options: Arguments of its constructor, or one of its parameter groups.

    Raises:
        ValueError: If the optimizer is any other, or ``differentiable`` is set; the message says what would work.
    """
    name = optimizer.__qualname__
    if optimizer not in KNOWN and vars(optimizer).get("elementwise") is not True:
        raise ValueError(
            f"{name} is not known to update each element by itself, so its state cannot be sharded in flat pieces. Use "
            f"an element-wise optimizer of torch ({', '.join(sorted(c.__name__ for c in KNOWN))}); if {name} is one, "
            "its class must say so: elementwise = True"
        )
    if options.get("differentiable"):
        raise ValueError(
            f"{name} with differentiable=True would keep the graph of its step, which sharding cuts; leave that out"
        )
