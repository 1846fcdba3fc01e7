"""Small checkpoints, and ways to damage them or to plant code in them."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tedlab import checkpoint
from tedlab.checkpoint.directory import MANIFEST, META
from tedlab.checkpoint.manifest import Manifest, measure, read_manifest

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "a bit flipped in the middle": lambda content: _flipped(content, len(content) // 2),
    "a bit flipped in the first byte": lambda content: _flipped(content, 0),
    "a bit flipped near the end": lambda content: _flipped(content, len(content) - 2),
    "cut in half": lambda content: content[: len(content) // 2],
    "cut by a byte": lambda content: content[:-1],
    "emptied": lambda content: b"",
    "deleted": lambda content: None,
    "garbage": lambda content: bytes(range(256)) * 4,
    "longer": lambda content: content + b"x",
}


def write(path: Path, value: float, **meta: Any) -> None:
    """A checkpoint of one tensor and of a number among the optimizer's."""
    tensors = {"model": {"weight": torch.full((300,), value)}, "optimizer_0": {"param_groups": [{"lr": value}]}}
    checkpoint.save(tensors, {"global_step": int(value), "value": value, **meta}, path)


def read(path: Path) -> tuple[float, float, float]:
    """The three places that have the value."""
    tensors: dict[str, Any] = {"model": {"weight": torch.zeros(300)}, "optimizer_0": {"param_groups": [{"lr": 0.0}]}}
    meta = checkpoint.read_meta(path)
    checkpoint.load(tensors, path)
    (value,) = set(tensors["model"]["weight"].tolist())
    return value, tensors["optimizer_0"]["param_groups"][0]["lr"], meta["value"]


def damaged(source: Path, target: Path, file: str, damage: str) -> Path:
    """A copy of a directory with one file damaged."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    content = DAMAGES[damage]((source / file).read_bytes())
    if content is None:
        (target / file).unlink()
    else:
        (target / file).write_bytes(content)
    return target


def seal(path: Path) -> None:
    """A manifest for whatever is there, as somebody would write it who has changed a checkpoint on purpose."""
    old = read_manifest(path)
    assert old is not None
    names = [file.name for file in path.iterdir() if file.name != MANIFEST]
    files = {name: measure(path / name) for name in names}
    (path / MANIFEST).write_bytes(Manifest(old.save_id, old.step, files).to_json())


def age(path: Path) -> None:
    """Makes a checkpoint one from before there were manifests."""
    meta = checkpoint.read_meta(path)
    del meta["save_id"]
    torch.save(meta, path / META)
    (path / MANIFEST).unlink()


class Payload:
    """Whoever unpickles it creates a file: ``open(path, "x")``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def payload(path: Path) -> bytes:
    return pickle.dumps(Payload(path))


def _flipped(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 0x10
    return bytes(changed)
