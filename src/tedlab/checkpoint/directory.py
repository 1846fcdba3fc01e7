"""Checkpoints: one directory that every process writes its shards into, readable under any other layout.

``torch.distributed.checkpoint`` stores tensors by their global place, so a shard saved by one layout is found by
another. What is not a tensor (progress, schedulers, data position, hyper-parameters) is in ``meta.pt``, and
``manifest.json`` has every file's checksum. Reading any of it runs no code.
"""

import os
import re
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from tedlab._compat.torch import flatten_state_dict
from tedlab.checkpoint import durable, values
from tedlab.checkpoint.manifest import MANIFEST, File, Manifest, measure, of_bytes, read_manifest
from tedlab.checkpoint.reading import METADATA, Planner, Reader, read_metadata

META = "meta.pt"
_MODEL = "model."  # before the names of the model's tensors
_SAVE_ID = "save_id"  # in META: what has one has a manifest
_OURS = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|meta\.pt|manifest\.json")  # files of a checkpoint


@dataclass(frozen=True)
class Prepared:
    """What :func:`write` needs besides the shards."""

    save_id: str
    step: int | None
    meta: bytes


def save(tensors: dict[str, Any], meta: Mapping[str, Any], path: Path, group: dist.ProcessGroup | None = None) -> None:
    """Writes a checkpoint. Collective: every process calls it with its own shards.

    Everything goes to a folder beside ``path`` that takes its place at the very end, when all of it is on the disk: a
    crash on the way, of processes or of the machine, leaves whatever was at ``path`` before. In the moment between two
    renames that is beside it, where reading finds it.

    Args:
        tensors: nested dictionaries of DTensors and tensors.
        meta: everything else, the same on every process.
        path: of the directory.
        group: all processes, in a group that nothing else uses meanwhile; None: the default one.

    Raises:
        OSError: if a process could not write; says which, why, and what is still there.
        TypeError: if there is a value that could not be read again without running code; names it.
    """
    write(tensors, prepare(tensors, meta), path, group)


def prepare(tensors: dict[str, Any], meta: Mapping[str, Any]) -> Prepared:
    """The part of saving that needs no other process: checks values, and takes a copy of ``meta``.

    Raises:
        TypeError: if there is a value that could not be read again without running code; names it.
    """
    flat = flatten_state_dict(tensors)[0]
    values.encode({name: value for name, value in flat.items() if not isinstance(value, Tensor)})
    save_id = uuid.uuid4().hex  # the first process's counts
    return Prepared(save_id, meta.get("global_step"), values.encode({**meta, _SAVE_ID: save_id}))


def write(tensors: dict[str, Any], prepared: Prepared, path: Path, group: dist.ProcessGroup | None = None) -> None:
    """The rest of :func:`save`. Collective."""
    partial, rank = durable.partial(path), dist.get_rank(group)
    in_use = ExitStack()

    def begin() -> None:
        durable.discard(partial)
        partial.mkdir(parents=True)
        in_use.enter_context(durable.held(partial))
        _clean(path.parent, keep=partial)

    def finish() -> None:
        files = {name: file for part in parts for name, file in part.items()}
        durable.write(partial / META, prepared.meta)
        files |= {META: of_bytes(prepared.meta), METADATA: measure(partial / METADATA)}
        durable.write(partial / MANIFEST, Manifest(prepared.save_id, prepared.step, files).to_json())
        durable.sync_directory(partial)
        durable.put(partial, path)

    with in_use:
        _leader(begin, path, group)
        try:
            dcp.save(tensors, checkpoint_id=partial, process_group=group)
        except CheckpointException as error:
            failed, (cause, _) = next(iter(error.failures.items()))
            raise _unwritten(path, failed, cause) from None
        parts = _from_all(lambda: _measured(partial.glob(f"__{rank}_*.distcp")), path, group)
        _leader(finish, path, group)


def load(tensors: dict[str, Any], path: Path, strict: bool = True) -> None:
    """Fills ``tensors`` (nested dictionaries of DTensors and tensors) in place, after :func:`verify`. Collective.

    Args:
        tensors: ``model`` and whatever else the checkpoint holds.
        path: of the checkpoint.
        strict: whether it must hold the model's tensors and no other; False: those of the same name are taken.

    Raises:
        FileNotFoundError: if ``path`` is not a complete checkpoint.
        ValueError: in every process, if the checkpoint is of another model or optimizer, or a file is damaged or of
            another save; names what differs.
    """
    metadata = verify(path)
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
    read(tensors, path)


def read(tensors: dict[str, Any], path: Path) -> None:
    """Fills ``tensors`` from a checkpoint that was verified. Collective, if there are other processes.

    Raises:
        ValueError: if a file is damaged in a way that only its use shows: there was no checksum to verify.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is the intent
        try:
            dcp.load(tensors, storage_reader=Reader(_present(path)), planner=Planner())
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise ValueError(f"{path} is damaged: {type(cause).__name__}: {str(cause).splitlines()[0]}") from None


def verify(path: Path) -> Metadata:
    """Compares every file of a checkpoint with its manifest. Collective: processes share the work.

    A checkpoint from before there were manifests is looked at as far as that goes: whether files are there and long
    enough. A warning says so.

    Returns:
        What the checkpoint says of its tensors.

    Raises:
        FileNotFoundError: if ``path`` is not a complete checkpoint.
        ValueError: in every process, if a file is not as it was written; says which, and what is wrong.
    """
    distributed = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    problem: Exception | None = None
    try:
        metadata = _verified(_complete(path), rank, size)
    except (OSError, ValueError) as error:
        problem = error
    problems = [problem]
    if distributed:
        problems = [None] * size
        dist.all_gather_object(problems, problem)
    for found in filter(None, problems):
        raise found
    return metadata


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

    Links to it (Lightning moves ``last.ckpt`` only afterwards) first lead to the newest checkpoint beside it, and it is
    renamed before its files go, so a crash on the way leaves nothing that looks like a checkpoint and is none.
    """
    others = [other for other in _checkpoints(path.parent) if other.resolve() != path.resolve()]
    links = [link for link in path.parent.glob("*") if link.is_symlink() and link.resolve() == path.resolve()]
    for link in links if others else []:
        newest = max(others, key=lambda other: (other / META).stat().st_mtime_ns)
        _link(link.with_name(newest.resolve().name), link)
    if path.is_symlink() or not path.exists():
        path.unlink(missing_ok=True)
        return
    doomed = durable.partial(path)
    durable.discard(doomed)
    path.rename(doomed)
    durable.discard(doomed)


def link(target: Path, path: Path, group: dist.ProcessGroup | None = None) -> None:
    """Makes ``path`` a symbolic link to a checkpoint, whatever is there. Collective.

    Raises:
        OSError: if the first process could not.
    """
    _leader(lambda: _link(target, path), path, group)


def stored_names(path: Path) -> set[str]:
    """Names of everything in the checkpoint beside ``meta.pt``: tensors, and what an optimizer has besides.

    Raises:
        FileNotFoundError: if ``path`` is not a complete checkpoint.
        ValueError: if the file that says so is damaged.
    """
    path = _complete(path)
    return set(_metadata(path, _manifest(path)).state_dict_metadata)


def stored_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """Name → shape, dtype and chunks of every tensor in the checkpoint, without reading any.

    Raises:
        FileNotFoundError: if ``path`` is not a complete checkpoint.
        ValueError: if the file that says so is damaged.
    """
    path = _complete(path)
    entries = _metadata(path, _manifest(path)).state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors. Runs no code of the file.

    Raises:
        FileNotFoundError: if ``path`` is not a complete checkpoint.
        ValueError: if the file that says so is damaged, or asks for code to be run.
    """
    path = _complete(path)
    manifest = _manifest(path)
    wrong = manifest.check(path, [META]) if manifest is not None else None
    if wrong:
        raise ValueError(f"{path} is damaged: {wrong}")
    return _decoded(path)


def _complete(path: Path) -> Path:
    path = _present(path)
    if not (path / META).is_file() or not (path / METADATA).is_file():
        what = "does not exist" if not path.exists() else f"lacks {META} or {METADATA}"
        near = _beside(path, "checkpoints beside it")
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it {what}{near}")
    return path


def _beside(path: Path, heading: str) -> str:
    """For the end of a message: the checkpoints in the same folder; nothing if there are none."""
    found = _checkpoints(path.parent)
    return f"; {heading}: " + ", ".join(map(str, found)) if found else ""


def _checkpoints(folder: Path) -> list[Path]:
    """Those in a folder, links to them included."""
    found = (file.parent for file in folder.glob(f"*/{META}") if file.with_name(METADATA).is_file())
    return sorted(path for path in found if path.suffix not in (".partial", ".old"))


def _present(path: Path) -> Path:
    old = durable.replaced(path)
    return old if not path.exists() and old.exists() else path


def _clean(folder: Path, keep: Path) -> None:
    """Deletes what processes that died have left of saving; nothing that a living one writes, nor anybody else's."""
    with suppress(OSError):  # another process may clean at the same time
        for path in folder.glob("*.partial"):
            if path != keep and not path.is_symlink() and _is_ours(path):
                with durable.held(path) as abandoned:
                    if abandoned:
                        durable.discard(path)
        for path in folder.glob("*.old"):
            if (path.with_suffix("") / META).is_file() and (path.is_symlink() or _is_ours(path)):
                durable.discard(path)


def _is_ours(path: Path) -> bool:
    return path.is_dir() and all(_OURS.fullmatch(file.name) for file in path.iterdir())


def _link(target: Path, path: Path) -> None:
    new = durable.partial(path)
    durable.discard(new)
    new.symlink_to(os.path.relpath(target, path.parent))
    durable.put(new, path)


def _measured(files: Iterable[Path]) -> dict[str, File]:
    return {file.name: measure(file) for file in files}


def _leader(task: Callable[[], None], path: Path, group: dist.ProcessGroup | None) -> None:
    """The first process does something; if it cannot, every process says so. Collective."""
    cause: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            task()
        except Exception as error:  # the others wait to hear of it, whatever it is
            cause = error
    failure = [None if cause is None else f"{cause}"]
    dist.broadcast_object_list(failure, group=group, group_src=0)
    if failure[0] is not None:
        raise _unwritten(path, 0, failure[0]) from cause


def _from_all(
    task: Callable[[], dict[str, File]], path: Path, group: dist.ProcessGroup | None
) -> list[dict[str, File]]:
    """What every process finds; if one cannot, every process says so. Collective."""
    found: dict[str, File] | OSError
    try:
        found = task()
    except OSError as error:
        found = error
    everybody: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everybody, found, group)
    for rank, answer in enumerate(everybody):
        if isinstance(answer, OSError):
            raise _unwritten(path, rank, answer)
    return everybody


def _unwritten(path: Path, rank: int, cause: object) -> OSError:
    return OSError(f"process {rank} could not write the checkpoint {path}: {cause}{_beside(path, 'intact')}")


def _verified(path: Path, rank: int, size: int) -> Metadata:
    """This process's share of :func:`verify`."""
    manifest = _manifest(path)
    metadata = _metadata(path, manifest)
    shards = {place.relative_path for place in metadata.storage_data.values()}
    if manifest is None:
        wrong = _too_short(metadata, path)
        if rank == 0:
            warnings.warn(f"{path} has no {MANIFEST}, as before tedlab wrote them: damage may go unseen", stacklevel=3)
    else:
        shards |= manifest.files.keys() - {META, METADATA}
        wrong = manifest.check(path, [META, *sorted(shards, key=_natural)[rank::size]])
    if wrong:
        raise ValueError(f"{path} is damaged: {wrong}")
    return metadata


def _manifest(path: Path) -> Manifest | None:
    """None for a checkpoint from before there were manifests."""
    manifest = read_manifest(path)
    if manifest is None and _SAVE_ID in _decoded(path):
        raise ValueError(f"{path} is damaged: {MANIFEST} is missing")
    return manifest


def _metadata(path: Path, manifest: Manifest | None) -> Metadata:
    wrong = manifest.check(path, [METADATA]) if manifest is not None else None
    if wrong:
        raise ValueError(f"{path} is damaged: {wrong}")
    return read_metadata(path / METADATA)


def _decoded(path: Path) -> dict[str, Any]:
    try:
        meta = values.decode((path / META).read_bytes())
        if not isinstance(meta, dict):
            raise TypeError(f"it holds a {type(meta).__name__}")
    except Exception as error:  # damaged bytes may raise anything
        raise ValueError(f"{path / META} is damaged or asks for code to be run, and was not read: {error}") from None
    return meta


def _natural(name: str) -> list[Any]:
    """Sorts numbers in names as numbers: then a process of the same layout verifies what it also reads."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _too_short(metadata: Metadata, path: Path) -> str | None:
    """The first file that is missing or shorter than what it should hold."""
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        file = path / name
        size = file.stat().st_size if file.exists() else None
        if size is None or size < end:
            return f"{name} is missing" if size is None else f"{name} has {size:,} bytes of {end:,}"
    return None


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
