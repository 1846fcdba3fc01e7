"""Writes and reads a checkpoint piece by piece, in one process that never holds the whole model.

The files are those of :mod:`tedlab.checkpoint.directory`: any layout reads what is written here, and what any layout
wrote is read here.
"""

import io
import os
import pickle
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tedlab._compat.torch import StorageInfo
from tedlab.checkpoint import durable, values
from tedlab.checkpoint.directory import META, SAVE_ID, verify
from tedlab.checkpoint.manifest import MANIFEST, Manifest, measure, of_bytes
from tedlab.checkpoint.reading import METADATA
from tedlab.progress import advancing

_FILE_BYTES = 1 << 30  # several processes share the work of verifying and reading files


class Piece(NamedTuple):
    """A part of a tensor: the whole, or what it has at one index of its first dimension.

    Attributes:
        name: Name of the tensor.
        shape: Shape of the whole tensor.
        row: The index; None: the piece is the whole.
        values: The piece, without that dimension.
    """

    name: str
    shape: tuple[int, ...]
    row: int | None
    values: Tensor


def write_pieces(
    pieces: Iterable[Piece], meta: Mapping[str, Any], path: Path, step: int = 0, file_bytes: int = _FILE_BYTES
) -> None:
    """Writes a checkpoint of pieces that come one after the other.

    Args:
        pieces: Together, all of each tensor.
        meta: Everything that is not a tensor.
        path: Directory of the checkpoint, which appears once it is complete.
        step: Number of optimizer steps taken.
        file_bytes: How large a file may grow before the next begins.

    Raises:
        OSError: If it cannot be written.
        TypeError: If a value of ``meta`` could not be read again without running code.
    """
    save_id = uuid.uuid4().hex
    encoded = values.encode({**meta, "global_step": step, SAVE_ID: save_id})
    partial = durable.partial(path)
    durable.discard(partial)
    partial.mkdir(parents=True)
    with durable.held(partial):
        described: dict[str, TensorStorageMetadata] = {}
        stored: dict[MetadataIndex, Any] = {}
        names: list[str] = []
        stream: io.BufferedWriter | None = None
        try:
            for piece in pieces:
                if stream is None or stream.tell() >= file_bytes:
                    _close(stream)
                    names.append(f"__0_{len(names)}.distcp")
                    stream = (partial / names[-1]).open("wb")
                start = stream.tell()
                whole = piece.values if piece.row is None else piece.values.unsqueeze(0)
                torch.save(whole.clone(memory_format=torch.contiguous_format), stream)
                offsets = torch.Size([piece.row or 0, *[0] * (len(piece.shape) - 1)])
                entry = described.setdefault(piece.name, _entry(piece.shape, whole.dtype))
                entry.chunks.append(ChunkStorageMetadata(offsets, whole.shape))
                place = StorageInfo(names[-1], start, stream.tell() - start)
                stored[MetadataIndex(piece.name, offsets, len(entry.chunks) - 1)] = place
        finally:
            _close(stream)
        durable.write(partial / METADATA, pickle.dumps(Metadata(dict(described), storage_data=stored)))
        durable.write(partial / META, encoded)
        files = {name: measure(partial / name) for name in (*names, METADATA)} | {META: of_bytes(encoded)}
        durable.write(partial / MANIFEST, Manifest(save_id, step, files).to_json())
        durable.sync_directory(partial)
        durable.put(partial, path)


def _close(stream: io.BufferedWriter | None) -> None:
    if stream is not None:
        with stream:
            stream.flush()
            os.fsync(stream.fileno())


def _entry(shape: Sequence[int], dtype: torch.dtype) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])


def shown(pieces: Iterable[Piece], doing: str, total: int) -> Iterator[Piece]:
    """Yields pieces, and shows how many of ``total`` elements have been written."""
    with advancing(doing, total) as advance:
        for piece in pieces:
            yield piece
            advance(piece.values.numel())


class PieceReader:
    """Reads parts of the tensors of a checkpoint, after it has verified all files.

    Raises:
        FileNotFoundError: If ``path`` is not a complete checkpoint.
        ValueError: If a file is damaged or belongs to another save.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._metadata = path, verify(path)

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Shape, dtype and chunks of every tensor."""
        entries = self._metadata.state_dict_metadata
        return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def rows(self, name: str) -> Iterator[range]:
        """Yields the smallest runs of indices of the first dimension such that no stored chunk is part of two."""
        entry = self.tensors[name]
        runs = sorted({(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) for chunk in entry.chunks})
        start, end = runs[0]
        for first, last in runs[1:]:
            if first >= end:
                yield range(start, end)
                start = first
            end = max(end, last)
        yield range(start, end)

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Reads a tensor, or some rows of it.

        Raises:
            ValueError: If the file turns out to be damaged.
        """
        entry = self.tensors[name]
        shape = list(entry.size)
        first = 0
        if rows is not None:
            first, shape[0] = rows.start, len(rows)
        result = torch.empty(shape, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            if not entry.size:
                return self._chunk(name, chunk)
            low = max(chunk.offsets[0], first)
            high = min(chunk.offsets[0] + chunk.sizes[0], first + shape[0])
            if low >= high:
                continue
            values = self._chunk(name, chunk)[low - chunk.offsets[0] : high - chunk.offsets[0]]
            if values.shape == tuple(shape):
                return values
            place = [slice(low - first, high - first)]
            place += [slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
            result[tuple(place)] = values
        return result

    def _chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        try:
            with (self.path / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                found = torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes may raise anything
            raise ValueError(f"{self.path} is damaged: {name} cannot be read: {error}") from None
        if not isinstance(found, Tensor) or found.shape != chunk.sizes:
            raise ValueError(f"{self.path} is damaged: {name} is not as its description says")
        return found
