"""Mixture-of-Experts: the router, the path of tokens to experts and back, the experts, and the layer they make."""

from tedlab.moe.dispatch import AllToAllPath, token_path
from tedlab.moe.experts import Experts
from tedlab.moe.health import relative_load, router_health
from tedlab.moe.layer import MoELayer, MoESpec
from tedlab.moe.router import Router, RouterReport, Routing, assign_slots

__all__ = [
    "AllToAllPath",
    "Experts",
    "MoELayer",
    "MoESpec",
    "Router",
    "RouterReport",
    "Routing",
    "assign_slots",
    "relative_load",
    "router_health",
    "token_path",
]
