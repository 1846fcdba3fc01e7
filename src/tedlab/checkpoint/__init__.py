"""Checkpoints that load under any layout, and functions to inspect them and to export the model."""

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
