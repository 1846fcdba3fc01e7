"""A checkpoint is one directory into which every process writes its shards; any other layout can read it.

``torch.distributed.checkpoint`` stores tensors by their global indices, so one layout finds the shards that another
saved. ``meta.pt`` holds everything that is not a tensor (progress, schedulers, data position, hyper-parameters), and
``manifest.json`` the checksum of every file. Reading a checkpoint runs no code from it.
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
from torch.distributed.tensor import DTensor

from tedlab._compat.torch import flatten_state_dict
from tedlab.checkpoint import durable, values
from tedlab.checkpoint.manifest import MANIFEST, File, Manifest, measure, of_bytes, read_manifest
from tedlab.checkpoint.reading import METADATA, Planner, Reader, read_metadata
from tedlab.progress import advancing

META = "meta.pt"
_MODEL = "model."  # prefix of the names of the model's tensors
SAVE_ID = "save_id"  # key in META; a checkpoint that has it also has a manifest
_OURS = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|meta\.pt|manifest\.json")  # names of a checkpoint's files


@dataclass(frozen=True)
class Prepared:
    """What :func:`write` needs besides the tensors.

    Attributes:
        save_id: Unique to each save.
        step: Number of optimizer steps taken; None if unknown.
        meta: Encoded content of ``meta.pt``.
    """

    save_id: str
    step: int | None
    meta: bytes


def save(tensors: dict[str, Any], meta: Mapping[str, Any], path: Path, group: dist.ProcessGroup | None = None) -> None:
    """Writes a checkpoint. Collective: every process calls it with its own shards.

    The files go to a folder beside ``path``, which takes the place of ``path`` once all of it is on the disk. If
    processes or the machine crash before that, the previous checkpoint survives: at ``path`` or, between the two final
    renames, beside it, where reading finds it.

    Args:
        tensors: Nested dictionaries of DTensors and tensors.
        meta: Everything else, equal on every process.
        path: Directory of the checkpoint.
        group: Process group of all processes that nothing else uses meanwhile; None is the default group.

    Raises:
        OSError: If a process cannot write. The message says which and why, and lists the intact checkpoints.
        TypeError: If a value could not be read again without running code. The message names it.
    """
    write(tensors, prepare(tensors, meta), path, group)


def prepare(tensors: dict[str, Any], meta: Mapping[str, Any]) -> Prepared:
    """Does the part of saving that needs no other process: checks the values and encodes ``meta``.

    Raises:
        TypeError: If a value could not be read again without running code. The message names it.
    """
    flat = flatten_state_dict(tensors)[0]
    values.encode({name: value for name, value in flat.items() if not isinstance(value, Tensor)})
    save_id = uuid.uuid4().hex  # only the first process's is used
    return Prepared(save_id, meta.get("global_step"), values.encode({**meta, SAVE_ID: save_id}))


def write(tensors: dict[str, Any], prepared: Prepared, path: Path, group: dist.ProcessGroup | None = None) -> None:
    """Does the rest of :func:`save`. Collective."""
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
    """Verifies a checkpoint and loads it into ``tensors`` in place. Collective.

    Args:
        tensors: Nested dictionaries of DTensors and tensors: ``model`` and whatever else is to be loaded.
        path: Directory of the checkpoint.
        strict: Whether the model's tensors must be the same as the checkpoint's. If False, those whose names occur in
            both are loaded.

    Raises:
        FileNotFoundError: If ``path`` is not a complete checkpoint.
        ValueError: On every process, if the checkpoint is of another model or optimizer, or a file is damaged or
            belongs to another save. The message names what differs.
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
    """Loads a verified checkpoint into ``tensors`` in place. Collective, if there are other processes.

    Raises:
        ValueError: If a file turns out to be damaged, as it may where there was no checksum to verify.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    here = (tensor for tensor in flatten_state_dict(tensors)[0].values() if isinstance(tensor, Tensor))
    total = sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel() for tensor in here)
    with warnings.catch_warnings(), advancing("loading", total, disable=not first) as advance:
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is intended
        try:
            dcp.load(tensors, storage_reader=Reader(_present(path)), planner=Planner(advance))
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise ValueError(f"{path} is damaged: {type(cause).__name__}: {str(cause).splitlines()[0]}") from None


def verify(path: Path) -> Metadata:
    """Compares every file of a checkpoint with its manifest. Collective: processes share the work.

    For a checkpoint that is too old to have a manifest, this only checks that files exist and are long enough, and
    warns of that.

    Returns:
        The description of the checkpoint's tensors.

    Raises:
        FileNotFoundError: If ``path`` is not a complete checkpoint.
        ValueError: On every process, if a file is not as it was written. The message says which, and what is wrong.
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
    """Loads only the weights of a checkpoint into a model that is sharded under any layout. Collective.

    To start training from these weights, call it in ``on_fit_start`` of the LightningModule.

    Args:
        module: The LightningModule that was saved, or one with parameters of the same names.
        path: Directory of the checkpoint.
        strict: Whether both must have the same names. If False, parameters whose names occur in both are loaded.

    Raises:
        FileNotFoundError: If ``path`` is not a complete checkpoint.
        ValueError: If the checkpoint is of another model, or damaged.
    """
    load({"model": module.state_dict()}, Path(path), strict)


def remove(path: Path) -> None:
    """Deletes a checkpoint. Only one process may call it.

    Links to it (Lightning moves ``last.ckpt`` only afterwards) are first pointed at the newest checkpoint beside it.
    The directory is renamed before its files are deleted, so a crash leaves nothing that only looks like a checkpoint.
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
    """Makes ``path`` a symbolic link to a checkpoint, replacing whatever is there. Collective.

    Raises:
        OSError: If the first process cannot write the link.
    """
    _leader(lambda: _link(target, path), path, group)


def stored_names(path: Path) -> set[str]:
    """Returns the names of everything stored outside ``meta.pt``: tensors, and other state of an optimizer.

    Raises:
        FileNotFoundError: If ``path`` is not a complete checkpoint.
        ValueError: If the file that describes its contents is damaged.
    """
    path = _complete(path)
    return set(_metadata(path, _manifest(path)).state_dict_metadata)


def stored_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """Maps the name of every tensor in the checkpoint to its shape, dtype and chunks, without reading the tensors.

    Raises:
        FileNotFoundError: If ``path`` is not a complete checkpoint.
        ValueError: If the file that describes its contents is damaged.
    """
    path = _complete(path)
    entries = _metadata(path, _manifest(path)).state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_meta(path: Path) -> dict[str, Any]:
    """Reads ``meta.pt``, which holds everything but tensors, without running code from it.

    Raises:
        FileNotFoundError: If ``path`` is not a complete checkpoint.
        ValueError: If the file is damaged, or asks for code to be run.
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
    """Lists the checkpoints in the same folder, for the end of a message; returns "" if there are none."""
    found = _checkpoints(path.parent)
    return f"; {heading}: " + ", ".join(map(str, found)) if found else ""


def _checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, including links to them."""
    found = (file.parent for file in folder.glob(f"*/{META}") if file.with_name(METADATA).is_file())
    return sorted(path for path in found if path.suffix not in (".partial", ".old"))


def _present(path: Path) -> Path:
    old = durable.replaced(path)
    return old if not path.exists() and old.exists() else path


def _clean(folder: Path, keep: Path) -> None:
    """Deletes what dead processes left of their saves, but nothing that a live process writes or that is not ours."""
    with suppress(OSError):  # another process may be cleaning at the same time
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
    """Runs a task on the first process; if it fails, every process raises OSError. Collective."""
    cause: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            task()
        except Exception as error:  # whatever it is: the others are waiting in the broadcast
            cause = error
    failure = [None if cause is None else f"{cause}"]
    dist.broadcast_object_list(failure, group=group, group_src=0)
    if failure[0] is not None:
        raise _unwritten(path, 0, failure[0]) from cause


def _from_all(
    task: Callable[[], dict[str, File]], path: Path, group: dist.ProcessGroup | None
) -> list[dict[str, File]]:
    """Gathers the task's result from every process; if one meets an OSError, every process raises it. Collective."""
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
    """Does this process's share of :func:`verify`."""
    manifest = _manifest(path)
    metadata = _metadata(path, manifest)
    shards = {place.relative_path for place in metadata.storage_data.values()}
    if manifest is None:
        wrong = _too_short(metadata, path)
        if rank == 0:
            warnings.warn(f"{path} has no {MANIFEST}, as before tedlab wrote them: damage may go unseen", stacklevel=3)
    else:
        shards |= manifest.files.keys() - {META, METADATA}
        names = [META, *sorted(shards, key=_natural)[rank::size]]
        total = sum((path / name).stat().st_size for name in names if (path / name).is_file())
        with advancing("verifying", total, disable=rank != 0) as advance:
            wrong = manifest.check(path, names, advance)
    if wrong:
        raise ValueError(f"{path} is damaged: {wrong}")
    return metadata


def _manifest(path: Path) -> Manifest | None:
    """Reads the manifest; returns None for a checkpoint that is too old to have one."""
    manifest = read_manifest(path)
    if manifest is None and SAVE_ID in _decoded(path):
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
    """Returns a key that sorts numbers in names by value: under the same layout a process verifies what it reads."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _too_short(metadata: Metadata, path: Path) -> str | None:
    """Describes the first file that is missing or shorter than its contents should be."""
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
