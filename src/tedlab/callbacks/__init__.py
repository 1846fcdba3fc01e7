"""Lightning callbacks."""

from tedlab.callbacks.metrics import StepMetrics
from tedlab.callbacks.progress import RunProgress

__all__ = ["RunProgress", "StepMetrics"]
