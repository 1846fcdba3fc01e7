"""Checkpoints that outlive the layout they were saved under, and a command line to look into them."""

from tedlab.checkpoint.attached import attach, detach
from tedlab.checkpoint.directory import (
    META,
    load,
    load_weights,
    read,
    read_meta,
    save,
    stored_names,
    stored_tensors,
    verify,
)
from tedlab.checkpoint.values import encode, plain
from tedlab.checkpoint.writer import Writer

__all__ = [
    "META",
    "Writer",
    "attach",
    "detach",
    "encode",
    "load",
    "load_weights",
    "plain",
    "read",
    "read_meta",
    "save",
    "stored_names",
    "stored_tensors",
    "verify",
]
