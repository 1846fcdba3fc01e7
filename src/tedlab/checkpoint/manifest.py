"""``manifest.json`` lists the files of a checkpoint with size and checksum, and identifies the save they belong to.

The checksum is the CRC-32 of zip and gzip. It always detects a flipped bit, misses other content once in four billion
times, and a core computes it faster than disks write. It is no signature: whoever can change a file can change the
manifest too.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tedlab.progress import Advance

MANIFEST = "manifest.json"
_FORMAT = 1
_BLOCK = 1 << 22  # bytes per read


def _silently(amount: float) -> None:
    pass


@dataclass(frozen=True)
class File:
    """A file's size in bytes, and its CRC-32 as eight hexadecimal digits."""

    size: int
    crc32: str


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        save_id: Unique to each save.
        step: Number of optimizer steps taken; None if the caller did not give it.
        files: Size and checksum of each file, by name.
    """

    save_id: str
    step: int | None
    files: Mapping[str, File]

    def to_json(self) -> bytes:
        """Returns the manifest as JSON, with a checksum of its own."""
        files = {name: [file.size, file.crc32] for name, file in sorted(self.files.items())}
        content = {"format": _FORMAT, "save_id": self.save_id, "step": self.step, "files": files}
        own = of_bytes(json.dumps(content).encode()).crc32
        return json.dumps({**content, "crc32": own}, indent=1).encode()

    def check(self, directory: Path, names: Iterable[str], advance: Advance = _silently) -> str | None:
        """Says what is wrong with the first of these files that is not as it was written; returns None if all are.

        Args:
            directory: The checkpoint.
            names: The files to check.
            advance: Is told how many bytes more have been read.
        """
        for name in names:
            expected, path = self.files.get(name), directory / name
            if expected is None:
                return f"{name} is not in its {MANIFEST}: it is of another save"
            try:
                size = path.stat().st_size
                found = File(size, "") if size != expected.size else measure(path, advance)
            except FileNotFoundError:
                return f"{name} is missing"
            except OSError as error:
                return f"{name} cannot be read: {error}"
            if found.size != expected.size:
                return f"{name} has {found.size:,} bytes of {expected.size:,}"
            if found != expected:
                return (
                    f"{name} has the checksum {found.crc32}, and {expected.crc32} when it was written: "
                    "its content has changed since, or it is of another save"
                )
        return None


def is_file_name(name: str) -> bool:
    """Tells whether a name is a plain file name, which cannot lead out of its directory."""
    return Path(name).name == name != ".."


def measure(path: Path, advance: Advance = _silently) -> File:
    """Computes the size and checksum of a file, and tells ``advance`` how many bytes more have been read."""
    size, checksum, block = 0, 0, memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            checksum = zlib.crc32(block[:count], checksum)
            size += count
            advance(count)
    return File(size, f"{checksum:08x}")


def of_bytes(content: bytes) -> File:
    """Returns what :func:`measure` would for a file of this content."""
    return File(len(content), f"{zlib.crc32(content):08x}")


def read_manifest(directory: Path) -> Manifest | None:
    """Reads the manifest of a checkpoint; returns None if there is none, as in old checkpoints.

    Raises:
        ValueError: If the file is damaged or has another format version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        written = path.read_bytes()
        content = json.loads(written)
        version = content["format"]
        if version == _FORMAT:
            files = {name: File(size, crc32) for name, (size, crc32) in content["files"].items()}
            manifest = Manifest(content["save_id"], content["step"], files)
            if manifest.to_json() == written and all(map(is_file_name, files)):
                return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        version = _FORMAT
    if version != _FORMAT:
        raise ValueError(f"{path} is of format {version}; this version of tedlab reads format {_FORMAT}")
    raise ValueError(f"{directory} is damaged: {MANIFEST} is not as it was written")
