"""Collectives by group kind: the raw operations with their hooks, the differentiable pairs, and recomputation (CAC)."""

from tedlab.comm.agreement import SlotAgreement
from tedlab.comm.collectives import (
    TRAINING_PHASES,
    Collective,
    Collectives,
    Hook,
    Operation,
    Pending,
    Phase,
    Splits,
)
from tedlab.comm.differentiable import (
    all_to_all,
    copy_to,
    gather_from,
    gather_to,
    matmul_into,
    reduce_from,
    scatter_from,
    slice_to,
    to_compute_dtype,
)
from tedlab.comm.issued import Issued, issue_all_to_all, issue_gather_to, issue_scatter_from
from tedlab.comm.ledger import Ledger
from tedlab.comm.recompute import (
    Recomputation,
    RecomputePlan,
    Second,
    evaluating,
    once,
    pin,
    recomputed,
    recomputing,
)
from tedlab.comm.route import Numbers, Relay, Route, route
from tedlab.comm.whereabouts import Waiting, Whereabouts
from tedlab.degrees import GroupKind

__all__ = [
    "TRAINING_PHASES",
    "Collective",
    "Collectives",
    "GroupKind",
    "Hook",
    "Issued",
    "Ledger",
    "Numbers",
    "Operation",
    "Pending",
    "Phase",
    "Recomputation",
    "RecomputePlan",
    "Relay",
    "Route",
    "Second",
    "SlotAgreement",
    "Splits",
    "Waiting",
    "Whereabouts",
    "all_to_all",
    "copy_to",
    "evaluating",
    "gather_from",
    "gather_to",
    "issue_all_to_all",
    "issue_gather_to",
    "issue_scatter_from",
    "matmul_into",
    "once",
    "pin",
    "recomputed",
    "recomputing",
    "reduce_from",
    "route",
    "scatter_from",
    "slice_to",
    "to_compute_dtype",
]
