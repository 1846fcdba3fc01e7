"""Collectives by group kind: the raw operations with their hooks, and the differentiable pairs built from them."""

from tedlab.comm.collectives import Collective, Collectives, GroupKind, Hook, Pending, Phase
from tedlab.comm.differentiable import all_to_all, copy_to, reduce_from

__all__ = ["Collective", "Collectives", "GroupKind", "Hook", "Pending", "Phase", "all_to_all", "copy_to", "reduce_from"]
