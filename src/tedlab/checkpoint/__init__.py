"""Checkpoints that outlive the layout they were saved under, and a command line to look into them."""

from tedlab.checkpoint.attached import attach, detach
from tedlab.checkpoint.directory import META, load, load_weights, read_meta, save, stored_names, stored_tensors
from tedlab.checkpoint.writer import Writer

__all__ = [
    "META",
    "Writer",
    "attach",
    "detach",
    "load",
    "load_weights",
    "read_meta",
    "save",
    "stored_names",
    "stored_tensors",
]
