"""What a checkpoint holds besides its shards, as bytes that can be read without running any code.

``torch.load(weights_only=True)`` reads tensors, numbers, strings and containers, and NumPy arrays of numbers, which
random states are. What it would refuse when the checkpoint is loaded is refused when the checkpoint is saved.
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
    # Where NumPy 1 and NumPy 2 have them.
    *((_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_ONE_AT_A_TIME = threading.Lock()  # torch's list of what is safe is one for all threads, which may be ranks (sim)
_ALLOW = (
    "A checkpoint is read without running any code, so it holds tensors, numbers, strings and plain containers only. "
    "Leave it out or convert it, or, if it is safe to construct, allow it where you save and where you load: "
    "torch.serialization.add_safe_globals([...])"
)


def encode(values: Mapping[str, Any]) -> bytes:
    """As bytes, for :func:`decode`.

    Raises:
        TypeError: naming the key and the type of a value that :func:`decode` would refuse.
    """
    try:
        content = _dumped(dict(values))
        decode(content)
    except Exception as error:
        found = _culprit(dict(values), "")
        if found is None:  # only its parts can be read
            raise
        name, value = found
        raise TypeError(f"{name} is of type {_name(type(value))}, which no checkpoint holds. {_ALLOW}") from error
    return content


def decode(content: bytes) -> dict[str, Any]:
    """What was encoded, tensors on the CPU. Runs no code of the content.

    Raises:
        Exception: of many types, if the content is damaged or asks for more.
    """
    with _ONE_AT_A_TIME, torch.serialization.safe_globals(_NUMPY):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def plain(value: Any) -> Any:
    """Hyper-parameters as plain containers, numbers and strings, where there is one obvious way."""
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
    except Exception:  # pickling may call anything
        return False
    return True


def _culprit(value: Any, name: str) -> tuple[str, Any] | None:
    """Name and value of the innermost part that cannot be stored."""
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
