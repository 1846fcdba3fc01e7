"""Least-Loaded Expert Parallelism: predicted beside reported, and a real run on emulated links."""
