"""Reads the files of torch.distributed.checkpoint without running any code that they ask for.

torch reads ``.metadata`` and entries that are not tensors with ``pickle``, which calls whatever a file names. Here a
file may name only what such files need.
"""

import io
import pathlib
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, metadata
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from typing_extensions import override

from tedlab._compat.python import PythonUnpickler
from tedlab._compat.torch import CHECKPOINT_CLASSES, StorageInfo, layout_by_name, set_element
from tedlab.checkpoint import values
from tedlab.checkpoint.manifest import is_file_name
from tedlab.progress import Advance
from tedlab.untrusted import one_line

METADATA = ".metadata"
_CLASSES = CHECKPOINT_CLASSES | {torch.Size, pathlib.PosixPath, pathlib.WindowsPath}


def _member(kind: Any, name: str) -> Any:
    if not (kind in _CLASSES and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"it asks for an attribute of {kind!r}, which no description of tensors needs")
    return kind[name]


_ALLOWED = {(kind.__module__, kind.__qualname__): kind for kind in _CLASSES} | {
    ("torch.serialization", "_get_layout"): layout_by_name,
    ("builtins", "getattr"): _member,  # how early releases of Python 3.11 save the members of enumerations
    ("pathlib._local", "PosixPath"): pathlib.PosixPath,  # the name in Python 3.13
}


class Reader(FileSystemReader):
    """Reads ``.metadata`` with :func:`read_metadata`; torch's own way of reading tensors is safe."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path) / METADATA)


class Planner(DefaultLoadPlanner):
    """Reads entries that are not tensors with :mod:`tedlab.checkpoint.values`.

    Args:
        advance: Takes how many more elements of tensors have been read.
    """

    def __init__(self, advance: Advance) -> None:
        super().__init__()
        self.advance = advance

    @override
    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self.advance(tensor.numel())

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[name], values.decode(value.getvalue()))


def read_metadata(path: Path) -> Metadata:
    """Reads ``.metadata``: every tensor's shape, dtype and pieces, and where in which file each piece is.

    Raises:
        ValueError: If the file is damaged, holds anything but such a description, or names a file elsewhere.
    """
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(found, Metadata):
            raise ValueError(f"it holds a {type(found).__name__}")
        for name, entry in found.state_dict_metadata.items():
            if isinstance(entry, metadata.TensorStorageMetadata) and not _is_whole(entry):
                raise ValueError(f"it does not say what {name} is")
        for index, place in found.storage_data.items():
            if not isinstance(place, StorageInfo) or not is_file_name(place.relative_path):
                raise ValueError(f"it looks for {index.fqn} elsewhere: {place}")
    except Exception as error:  # damaged bytes may raise anything
        raise ValueError(f"{path} is damaged or is not of a checkpoint: {one_line(error)}") from None
    found.storage_meta = found.storage_meta or metadata.StorageMeta()
    return found


def _is_whole(entry: metadata.TensorStorageMetadata) -> bool:
    dtype = entry.properties.dtype
    return isinstance(entry.size, torch.Size) and isinstance(entry.chunks, list) and isinstance(dtype, torch.dtype)


class _Unpickler(PythonUnpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no description of tensors needs")

    def load_build(self) -> None:
        """Sets attributes only of objects that the file made, never of shared classes, functions or enumerations."""
        made = self.stack[-2]
        if type(made) not in _CLASSES or isinstance(made, Enum):
            raise pickle.UnpicklingError(f"it would change {made!r}, which is not part of it")
        super().load_build()  # type: ignore[misc]

    dispatch = {**PythonUnpickler.dispatch, pickle.BUILD[0]: load_build}
