"""The Lightning strategy, and what it requires of a module, its data and its metrics."""

from tedlab.config import CheckpointOptions, CommOptions, ShardingOptions
from tedlab.strategy.strategy import HALF_PRECISIONS, TEDStrategy, gpus

__all__ = ["HALF_PRECISIONS", "CheckpointOptions", "CommOptions", "ShardingOptions", "TEDStrategy", "gpus"]
