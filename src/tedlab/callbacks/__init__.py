"""Lightning callbacks."""

from tedlab.callbacks.average import AverageWeights
from tedlab.callbacks.checkpoints import StepCheckpoint
from tedlab.callbacks.journal import Journal, log
from tedlab.callbacks.ledger import CommunicationLedger
from tedlab.callbacks.memory import MemoryByCategory
from tedlab.callbacks.metrics import StepMetrics
from tedlab.callbacks.progress import RunProgress
from tedlab.callbacks.prune import Prune
from tedlab.callbacks.ramp import FollowRamp
from tedlab.callbacks.router import RouterHealth
from tedlab.callbacks.routing import RecordRouting, ReplayRouting
from tedlab.callbacks.sets import NamedSets

__all__ = [
    "AverageWeights",
    "CommunicationLedger",
    "FollowRamp",
    "Journal",
    "MemoryByCategory",
    "NamedSets",
    "Prune",
    "RecordRouting",
    "ReplayRouting",
    "RouterHealth",
    "RunProgress",
    "StepCheckpoint",
    "StepMetrics",
    "log",
]
