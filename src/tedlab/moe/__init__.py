"""Mixture-of-Experts: the router, the path of tokens to experts and back, the experts, and their layer."""

from tedlab.moe.balance import Sums, global_losses, step_totals
from tedlab.moe.baselines import HashRouter, RandomRouter, RoundRobinRouter
from tedlab.moe.deepspeed_gating import DeepSpeedRouter
from tedlab.moe.dispatch import AllToAllPath, DispatchSpec, ReplicatedSlots, SlotRegion, TokenPath, token_path
from tedlab.moe.dropless import Dropless
from tedlab.moe.expert_choice import ExpertChoiceRouter
from tedlab.moe.experts import Experts, ExpertsSpec, RowExperts, SlotExperts, mixtures
from tedlab.moe.health import relative_load, router_health
from tedlab.moe.layer import MoELayer, MoESpec
from tedlab.moe.local import LocalExperts, TokenExperts
from tedlab.moe.packed import PackedExperts
from tedlab.moe.ragged import RaggedPath, RaggedRows, ReplicatedRows, RowPath, RowRegion
from tedlab.moe.router import (
    Decision,
    Router,
    RouterReport,
    RouterSpec,
    Routing,
    routers,
    routes_own_tokens,
    stacked,
)
from tedlab.moe.shared import SharedExperts, SharedSpec
from tedlab.moe.slots import assign_slots

__all__ = [
    "AllToAllPath",
    "Decision",
    "DeepSpeedRouter",
    "DispatchSpec",
    "Dropless",
    "ExpertChoiceRouter",
    "Experts",
    "ExpertsSpec",
    "HashRouter",
    "LocalExperts",
    "MoELayer",
    "MoESpec",
    "PackedExperts",
    "RaggedPath",
    "RaggedRows",
    "RandomRouter",
    "ReplicatedRows",
    "ReplicatedSlots",
    "RoundRobinRouter",
    "Router",
    "RouterReport",
    "RouterSpec",
    "Routing",
    "RowExperts",
    "RowPath",
    "RowRegion",
    "SharedExperts",
    "SharedSpec",
    "SlotExperts",
    "SlotRegion",
    "Sums",
    "TokenExperts",
    "TokenPath",
    "assign_slots",
    "global_losses",
    "mixtures",
    "relative_load",
    "router_health",
    "routers",
    "routes_own_tokens",
    "stacked",
    "step_totals",
    "token_path",
]
