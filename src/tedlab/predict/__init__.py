"""Predicts what a configuration costs before it runs: FLOPs, bytes, memory and seconds, on any cluster."""
