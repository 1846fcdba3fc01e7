"""Optimizers that may be sharded in flat pieces, and those that are refused by name."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from tedlab.optim.kinds import KNOWN, check_kind


class LAMB(Optimizer):
    """Takes a norm of each layer, as its own implementation would."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})


class LARS(SGD):
    """A subclass of an element-wise one, that overrides its step."""


class Lion(LAMB):
    elementwise = True


class TrustedLion(Lion):
    """Its parent's word is not its own."""


@pytest.mark.parametrize("optimizer", [*KNOWN, Lion])
def test_what_is_known_to_be_element_wise_or_says_so_is_taken(optimizer: type[Optimizer]) -> None:
    check_kind(optimizer, {})


@pytest.mark.parametrize("optimizer", [LAMB, LARS, TrustedLion, torch.optim.LBFGS, torch.optim.SparseAdam])
def test_anything_else_is_refused_by_name_and_told_how_to_say_so(optimizer: type[Optimizer]) -> None:
    with pytest.raises(ValueError, match=rf"^{optimizer.__name__} is not known .*AdamW.*elementwise = True"):
        check_kind(optimizer, {})


def test_every_optimizer_of_torch_that_is_not_known_is_refused() -> None:
    """A new one of torch's is refused until someone has looked at it."""
    names = {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)}
    unknown = names - {c.__name__ for c in KNOWN} - {"Optimizer"}
    assert {"LBFGS", "SparseAdam", "Adafactor", "Muon"} <= unknown
    for name in unknown:
        with pytest.raises(ValueError, match=name):
            check_kind(getattr(torch.optim, name), {})
