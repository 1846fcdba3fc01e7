"""Lightning callbacks."""

from tedlab.callbacks.checkpoints import StepCheckpoint
from tedlab.callbacks.journal import Journal, log
from tedlab.callbacks.ledger import CommunicationLedger
from tedlab.callbacks.memory import MemoryByCategory
from tedlab.callbacks.metrics import StepMetrics
from tedlab.callbacks.progress import RunProgress
from tedlab.callbacks.router import RouterHealth

__all__ = [
    "CommunicationLedger",
    "Journal",
    "MemoryByCategory",
    "RouterHealth",
    "RunProgress",
    "StepCheckpoint",
    "StepMetrics",
    "log",
]
