"""Encodes what a checkpoint holds besides its shards as bytes that can be read without running any code.

``torch.load(weights_only=True)`` reads tensors, numbers, strings and containers. Here it also reads NumPy arrays of
numbers, which random states contain. Values that loading would refuse are refused when the checkpoint is saved.
"""

import io
import threading
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

_RECONSTRUCT = np.empty(0).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"),
    # The module names in NumPy 1 and NumPy 2.
    *((_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_ONE_AT_A_TIME = threading.Lock()  # all threads, which may be ranks (sim), share torch's list of safe classes
_ALLOW = (
    "A checkpoint is read without running any code, so it holds tensors, numbers, strings and plain containers only. "
    "Leave it out or convert it, or, if it is safe to construct, allow it where you save and where you load: "
    "torch.serialization.add_safe_globals([...])"
)


def encode(values: Mapping[str, Any]) -> bytes:
    """Encodes values as bytes for :func:`decode`.

    Raises:
        TypeError: If :func:`decode` would refuse a value. The message names its key and its type.
    """
    try:
        content = _dumped(dict(values))
        decode(content)
    except Exception as error:
        found = _culprit(dict(values), "")
        if found is None:  # every value can be stored, so there is none to name
            raise
        name, value = found
        raise TypeError(f"{name} is of type {_name(type(value))}, which no checkpoint holds. {_ALLOW}") from error
    return content


def decode(content: bytes) -> dict[str, Any]:
    """Decodes what :func:`encode` made, with tensors on the CPU, without running code from the content.

    Raises:
        Exception: Of various types, if the content is damaged or asks for code to be run.
    """
    with _ONE_AT_A_TIME, torch.serialization.safe_globals(_NUMPY):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def plain(value: Any) -> Any:
    """Converts hyper-parameters to plain containers, numbers and strings where there is one obvious way."""
    if isinstance(value, DictConfig | ListConfig):
        return plain(OmegaConf.to_container(value, resolve=True))
    if isinstance(value, Namespace):
        return plain(vars(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Path):
        return str(value)
    if type(value) in (list, tuple, set):
        return type(value)(map(plain, value))
    return value


def _dumped(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _storable(value: Any) -> bool:
    try:
        decode(_dumped(value))
    except Exception:  # pickling may run any code and raise anything
        return False
    return True


def _culprit(value: Any, name: str) -> tuple[str, Any] | None:
    """Returns the name and value of the innermost part that cannot be stored; None if all of it can."""
    if _storable(value):
        return None
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple | set | frozenset):
        parts = enumerate(value)
    for key, part in parts:
        found = _culprit(part, f"{name}.{key}" if name else f"{key}")
        if found is not None:
            return found
    return name or "the whole", value


def _name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
