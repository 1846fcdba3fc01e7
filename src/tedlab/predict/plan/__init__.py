"""``tedlab plan``: the best layout for a model on a cluster (docs/plan.md)."""
