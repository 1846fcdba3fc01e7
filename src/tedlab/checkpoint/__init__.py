"""Checkpoints that outlive the layout they were saved under, and a command line to look into them."""

from tedlab.checkpoint.directory import META, load, read_meta, save, stored_tensors
from tedlab.checkpoint.writer import Writer

__all__ = ["META", "Writer", "load", "read_meta", "save", "stored_tensors"]
