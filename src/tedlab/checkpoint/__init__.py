"""Checkpoints that outlive the layout they were saved under, and a command line to look into them."""

from tedlab.checkpoint.directory import META, load, read_meta, save

__all__ = ["META", "load", "read_meta", "save"]
