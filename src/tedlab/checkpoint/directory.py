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
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

META = "meta.pt"
_MODEL = "model."  # before the names of the model's tensors


def save(tensors: dict[str, Any], meta: Mapping[str, Any], path: Path, group: dist.ProcessGroup | None = None) -> None:
    """Writes a checkpoint. Collective: every process calls it with its own shards.

    Everything goes to a folder beside ``path`` that takes its place at the very end, so a crash on the way leaves
    whatever was at ``path`` before; in the moment between two renames that is beside it, where reading finds it.

    Args:
        tensors: nested dictionaries of DTensors and tensors.
        meta: everything else, the same on every process.
        path: of the directory.
        group: all processes, in a group that nothing else uses meanwhile; None: the default one.

    Raises:
        OSError: if a process could not write; says which, why, and what is still there.
    """
    partial = path.with_name(path.name + ".partial")
    leader = dist.get_rank() == 0
    if leader:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group)
    try:
        dcp.save(tensors, checkpoint_id=partial, process_group=group)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        intact = _beside(path, "intact")
        raise OSError(f"process {rank} could not write the checkpoint {path}: {cause}{intact}") from None
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
    dist.barrier(group)


def load(tensors: dict[str, Any], path: Path, strict: bool = True) -> None:
    """Fills ``tensors`` (nested dictionaries of DTensors and tensors) in place. Collective.

    Args:
        tensors: ``model`` and whatever else the checkpoint holds.
        path: of the checkpoint.
        strict: whether it must hold the model's tensors and no other; False: those of the same name are taken.

    Raises:
        FileNotFoundError: if ``path`` is not a complete checkpoint.
        ValueError: if the checkpoint is of another model or optimizer, or a file is damaged; names what differs.
    """
    path = _complete(path)
    metadata = dcp.FileSystemReader(path).read_metadata()
    _check_files(metadata, path)
    _check_same_model(tensors["model"], metadata, path, strict)
    if not strict:
        there = {name for name in tensors["model"] if f"{_MODEL}{name}" in metadata.state_dict_metadata}
        tensors = {**tensors, "model": {name: tensors["model"][name] for name in there}}
    absent = sorted(set(flatten_state_dict(tensors)[0]) - set(metadata.state_dict_metadata))
    if absent:
        raise ValueError(
            f"{path} lacks {absent[0]}{f' and {len(absent) - 1} more' if absent[1:] else ''}: "
            "it was saved with another optimizer"
        )
    dcp.load(tensors, checkpoint_id=path)


def load_weights(module: nn.Module, path: str | Path, strict: bool = True) -> None:
    """Gives a model, sharded under any layout, the weights of a checkpoint, and nothing else of it. Collective.

    To begin a training from them, call it in ``on_fit_start`` of the LightningModule.

    Args:
        module: the LightningModule that was saved, or one with parameters of the same names.
        path: of the checkpoint.
        strict: whether names must be the same; False: those that both have are taken.

    Raises:
        FileNotFoundError: if ``path`` is not a complete checkpoint.
        ValueError: if the checkpoint is of another model, or damaged.
    """
    load({"model": module.state_dict()}, Path(path), strict)


def remove(path: Path) -> None:
    """Deletes a checkpoint. For one process.

    Links to it (Lightning moves ``last.ckpt`` only afterwards) first lead to the newest checkpoint beside it, so a
    crash on the way leaves none that ends in half a checkpoint.
    """
    others = [file for file in path.parent.glob(f"*/{META}") if file.parent.resolve() != path.resolve()]
    links = [link for link in path.parent.glob("*") if link.is_symlink() and link.resolve() == path.resolve()]
    for link in links if others else []:
        newest = max(others, key=lambda file: file.stat().st_mtime_ns).parent
        moved = link.with_name(link.name + ".partial")
        moved.unlink(missing_ok=True)
        moved.symlink_to(newest.resolve().name)
        moved.replace(link)
    shutil.rmtree(path, ignore_errors=True)


def stored_names(path: Path) -> set[str]:
    """Names of everything in the checkpoint beside ``meta.pt``: tensors, and what an optimizer has besides.

    Raises:
        FileNotFoundError: if ``path`` is not a complete checkpoint.
    """
    return set(dcp.FileSystemReader(_complete(path)).read_metadata().state_dict_metadata)


def stored_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """Name → shape, dtype and chunks of every tensor in the checkpoint, without reading any.

    Raises:
        FileNotFoundError: if ``path`` is not a complete checkpoint.
    """
    entries = dcp.FileSystemReader(_complete(path)).read_metadata().state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors.

    Raises:
        FileNotFoundError: if ``path`` is not a complete checkpoint.
        ValueError: if the file that says so is damaged.
    """
    path = _complete(path)
    try:
        return torch.load(path / META, weights_only=False)  # our own file; loggers' and callbacks' states are objects
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path / META} is damaged and cannot be read: {error}") from None


def _complete(path: Path) -> Path:
    path = _present(path)
    if not (path / META).is_file() or not (path / ".metadata").is_file():
        what = "does not exist" if not path.exists() else f"lacks {META} or .metadata"
        near = _beside(path, "checkpoints beside it")
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it {what}{near}")
    return path


def _beside(path: Path, heading: str) -> str:
    """For the end of a message: the checkpoints in the same folder; nothing if there are none."""
    found = sorted(file.parent for file in path.parent.glob(f"*/{META}"))
    return f"; {heading}: " + ", ".join(map(str, found)) if found else ""


def _replaced(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _present(path: Path) -> Path:
    return _replaced(path) if not path.exists() and _replaced(path).exists() else path


def _check_files(metadata: Metadata, path: Path) -> None:
    """Every file must be there and long enough; torch would fail somewhere in unpickling, without its name."""
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        file = path / name
        size = file.stat().st_size if file.exists() else None
        if size is None or size < end:
            found = "is missing" if size is None else f"has {size:,} bytes of {end:,}"
            raise ValueError(f"{path} is damaged: {name} {found}")


def _check_same_model(model: Mapping[str, Tensor], metadata: Metadata, path: Path, strict: bool) -> None:
    stored = metadata.state_dict_metadata
    there = {
        name.removeprefix(_MODEL): tuple(entry.size)
        for name, entry in stored.items()
        if name.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
    }
    here = {name: tuple(tensor.shape) for name, tensor in model.items()}
    compared = here.keys() | there.keys() if strict else here.keys() & there.keys()
    differences = [
        f"{name}: {there.get(name, 'absent')} in the checkpoint, {here.get(name, 'absent')} in this model"
        for name in sorted(compared)
        if here.get(name) != there.get(name)
    ]
    if differences:
        more = f"\n  … and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ValueError(
            f"{path} is a checkpoint of another model; {len(differences)} parameters differ:\n  "
            + "\n  ".join(differences[:5])
            + more
        )
