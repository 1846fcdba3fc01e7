"""Checkpoints: one directory that every process writes its shards into, readable under any other layout.

``torch.distributed.checkpoint`` stores tensors by their global place, so a shard saved by one layout is found by
another. What is not a tensor (progress, schedulers, data position, hyper-parameters) is in ``meta.pt``.
"""

import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

META = "meta.pt"


def save(tensors: dict[str, Any], meta: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint. Collective: every process calls it with its own shards.

    Everything goes to a folder beside ``path`` that takes its place at the very end, so a crash on the way leaves
    whatever was at ``path`` before; in the moment between two renames that is beside it, where reading finds it.
    """
    partial = path.with_name(path.name + ".partial")
    leader = dist.get_rank() == 0
    if leader:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dcp.save(tensors, checkpoint_id=partial)
    if leader:
        torch.save(dict(meta), partial / META)
        old = _replaced(path)
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def load(tensors: dict[str, Any], path: Path) -> dict[str, Any]:
    """Fills ``tensors`` (nested dictionaries of DTensors and tensors) in place and returns what is in ``meta.pt``.

    Raises:
        FileNotFoundError: if ``path`` is not a complete checkpoint.
        ValueError: if the checkpoint is of another model; names what differs.
    """
    meta = read_meta(path)
    path = _present(path)
    _check_same_model(tensors["model"], path)
    dcp.load(tensors, checkpoint_id=path)
    return meta


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors.

    Raises:
        FileNotFoundError: if ``path`` is not a complete checkpoint.
        ValueError: if the file that says so is damaged.
    """
    path = _present(path)
    if not (path / META).is_file() or not (path / ".metadata").is_file():
        what = "does not exist" if not path.exists() else f"lacks {META} or .metadata"
        near = sorted(p.parent for p in path.parent.glob(f"*/{META}"))
        hint = "; checkpoints beside it: " + ", ".join(map(str, near)) if near else ""
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it {what}{hint}")
    try:
        return torch.load(path / META, weights_only=False)  # our own file; loggers' and callbacks' states are objects
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path / META} is damaged and cannot be read: {error}") from None


def _replaced(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _present(path: Path) -> Path:
    return _replaced(path) if not path.exists() and _replaced(path).exists() else path


def _check_same_model(model: Mapping[str, Tensor], path: Path) -> None:
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    there = {
        name.removeprefix("model."): tuple(entry.size)
        for name, entry in stored.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    here = {name: tuple(tensor.shape) for name, tensor in model.items()}
    differences = [
        f"{name}: {there.get(name, 'absent')} in the checkpoint, {here.get(name, 'absent')} in this model"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    if differences:
        more = f"\n  … and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ValueError(
            f"{path} is a checkpoint of another model; {len(differences)} parameters differ:\n  "
            + "\n  ".join(differences[:5])
            + more
        )
