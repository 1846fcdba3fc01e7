"""The Lightning strategy, and what it asks of a module, its data and its metrics."""

from tedlab.strategy.strategy import HALF_PRECISIONS, TEDStrategy, gpus

__all__ = ["HALF_PRECISIONS", "TEDStrategy", "gpus"]
