"""Opens files that gzip or zstd has compressed as streams of bytes. ``formats.py`` decides what these hold."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import override

from tedlab.data.extra import needed

MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
SUFFIXES = (".gz", ".zst", ".zstd")
_BLOCK = 1 << 10  # bytes decompressed at a time, to 32 MiB at most: zstd takes four bytes for 128 KiB of equal ones
_AHEAD = 1 << 17  # decompressed bytes that are asked for at a time


class LongWindow(ValueError):
    """Decompressing would take too much memory; the message is a clause that begins with "it"."""


class Damaged(ValueError):
    """What is compressed is cut short or was changed; the message is a clause that says how."""


@contextmanager
def opened(path: Path, compression: str | None) -> Iterator[BinaryIO]:
    """Opens a file for reading, decompressed on the way if it is compressed.

    Args:
        path: The file.
        compression: ``gzip``, ``zstd``, or None for a file that is as it is.

    Raises:
        Damaged: Later, by a read that meets the damage.
        LongWindow: Likewise.
        MissingExtra: If a package is needed that is not installed.
    """
    if compression is None:
        with path.open("rb") as file:
            yield file
        return
    try:
        if compression == "gzip":
            with gzip.open(path, "rb") as stream:
                yield io.BufferedReader(stream)
        else:
            with path.open("rb") as raw, io.BufferedReader(_Zstd(raw), _AHEAD) as stream:
                yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Damaged(f"{error}".rstrip(".")) from None


class _Zstd(io.RawIOBase):
    """Decompressed bytes of all frames of a file. The package's own reader takes a frame cut short for its end."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._package = raw, needed("zstandard", "zstd")
        self._frame: Any = None
        self._rest, self._ready = b"", memoryview(b"")

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._rest or self._raw.read(_BLOCK)
            self._rest = b""
            if not block:
                if self._frame is not None:
                    raise EOFError("its last frame ends too early")
                return 0
            if self._frame is None:
                self._frame = self._package.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(block))
            except self._package.ZstdError as error:
                if "too much memory" in f"{error}":
                    raise LongWindow(
                        "it is compressed with a window of more than 128 MiB (zstd --long), all of which would be in "
                        "memory; compress it again without --long"
                    ) from None
                raise EOFError(f"{error}") from None
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
