"""Mixture-of-Experts: the router, the path of tokens to experts and back, the experts, and their layer."""

from tedlab.moe.deepspeed_gating import DeepSpeedRouter
from tedlab.moe.dispatch import AllToAllPath, DispatchSpec, ReplicatedSlots, SlotRegion, TokenPath, token_path
from tedlab.moe.experts import Experts, ExpertsSpec, RowExperts, SlotExperts, mixtures
from tedlab.moe.health import relative_load, router_health
from tedlab.moe.layer import MoELayer, MoESpec
from tedlab.moe.local import LocalExperts
from tedlab.moe.ragged import RaggedPath, RaggedRows, ReplicatedRows, RowPath, RowRegion
from tedlab.moe.router import (
    Decision,
    Router,
    RouterReport,
    RouterSpec,
    Routing,
    assign_slots,
    routers,
)

__all__ = [
    "AllToAllPath",
    "Decision",
    "DeepSpeedRouter",
    "DispatchSpec",
    "Experts",
    "ExpertsSpec",
    "LocalExperts",
    "MoELayer",
    "MoESpec",
    "RaggedPath",
    "RaggedRows",
    "ReplicatedRows",
    "ReplicatedSlots",
    "Router",
    "RouterReport",
    "RouterSpec",
    "Routing",
    "RowExperts",
    "RowPath",
    "RowRegion",
    "SlotExperts",
    "SlotRegion",
    "TokenPath",
    "assign_slots",
    "mixtures",
    "relative_load",
    "router_health",
    "routers",
    "token_path",
]
