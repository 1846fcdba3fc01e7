"""Estimates the memory of a rank and the time of a step in closed form (docs/plan.md)."""

from tedlab.predict.estimate.step import Estimate, estimate

__all__ = ["Estimate", "estimate"]
