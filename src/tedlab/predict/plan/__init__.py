"""Finds the best layout for a model on a cluster, for ``tedlab plan`` (docs/plan.md)."""
