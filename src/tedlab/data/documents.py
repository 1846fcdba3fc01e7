"""Where text comes from: the files that ``data.path`` names, which of them are held out, and the documents they hold.

Everything streams: no file is ever read as a whole. Turning documents into tokens is ``corpus.py``'s job.
"""

import codecs
import glob
import hashlib
import json
import math
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_BLOCK = 1 << 20  # bytes read at once
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True, order=True)
class SourceFile:
    """A file of the corpus. ``name`` is its path relative to the corpus, the same on every machine."""

    name: str
    path: Path
    size: int
    modified_ns: int


class Source(Protocol):
    """What one split reads of one file."""

    @property
    def size(self) -> int:
        """Bytes that are read."""

    def documents(self, advance: Callable[[int], object]) -> Iterator[Iterable[str]]:
        """The documents, each in blocks to be read in turn; ``advance`` is told the bytes as they are read."""


@dataclass(frozen=True)
class Text:
    """Bytes ``start`` to ``stop`` of a text file, one document."""

    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def documents(self, advance: Callable[[int], object]) -> Iterator[Iterable[str]]:
        yield self._blocks(advance)

    def _blocks(self, advance: Callable[[int], object]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()  # a very long line may be cut inside a character
        with self.path.open("rb") as file:
            file.seek(self.start)
            while block := file.read(min(_BLOCK, self.stop - file.tell())):
                # Blocks end with a line where they can, so that no word is tokenised in two halves.
                block += file.readline(min(_BLOCK, self.stop - file.tell()))
                advance(len(block))
                yield decoder.decode(block)


@dataclass(frozen=True)
class JsonLines:
    """One document per line of a JSONL file, from the field ``field``.

    ``held_out`` is the share of lines that is held out and ``validation`` says which side this is; None is all lines.
    """

    path: Path
    size: int
    field: str
    held_out: float | None = None
    validation: bool = False

    def documents(self, advance: Callable[[int], object]) -> Iterator[Iterable[str]]:
        number = -1  # of the document; blank lines are none
        with self.path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                advance(len(line))
                if not line.strip():
                    continue
                number += 1
                if self.held_out is None or _is_held_out(number, self.held_out) == self.validation:
                    yield [self._document(line, line_number)]

    def _document(self, line: bytes, line_number: int) -> str:
        where = f"Line {line_number} of {self.path}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}). A .jsonl file holds one JSON object per line.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} holds a {type(row).__name__}, but a .jsonl file holds one JSON object per line.")
        if self.field not in row:
            raise ValueError(
                f"{where} has no field {self.field!r}; its fields are {', '.join(map(repr, row)) or 'none at all'}. "
                f"Set data.field to the one that holds the text."
            )
        text = row[self.field]
        if not isinstance(text, str):
            raise ValueError(f"{where} holds a {type(text).__name__} in field {self.field!r}, not text.")
        # The file itself is UTF-8 without NUL, so that only an escape can give these.
        if b"\\u" in line and ("\0" in text or any("\ud800" <= character <= "\udfff" for character in text)):
            raise ValueError(f"{where} holds NUL or half a surrogate pair in field {self.field!r}, which no text does.")
        return text


def find_files(path: str | None) -> list[SourceFile]:
    """The files that ``path`` names, sorted by name, without reading any of them. Empty ones are left out.

    Args:
        path: A file, a folder (all of it but what is hidden), a glob (``**`` for any folders), or None for the source
            of the Python standard library, without its tests.

    Raises:
        FileNotFoundError: There is nothing there.
        ValueError: There are only empty files.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [file for file in _walk(root, skip=_NOT_LIBRARY) if file.suffix == ".py"]
    else:
        root = Path(path).expanduser()
        if root.is_file():
            root, paths = root.parent, [root]
        elif root.is_dir():
            paths = list(_walk(root, skip=frozenset()))
        elif glob.has_magic(path):
            paths = [Path(match) for match in glob.iglob(str(root), recursive=True) if os.path.isfile(match)]
            while glob.has_magic(str(root)):
                root = root.parent
        else:
            raise FileNotFoundError(f"data.path={path!r} does not exist. It must be a file, a folder or a glob.")
        if not paths:
            raise FileNotFoundError(f"data.path={path!r} names no file. Hidden files are left out.")
    files = []
    for file in paths:
        status = file.stat()
        if status.st_size:
            files.append(SourceFile(file.relative_to(root).as_posix(), file, status.st_size, status.st_mtime_ns))
    if not files:
        raise ValueError(f"data.path={path!r} names {len(paths)} files, all of them empty.")
    return sorted(set(files))  # a glob with several ** finds a file several times


def split(files: list[SourceFile], fraction: float, field: str) -> tuple[list[Source], list[Source]]:
    """What training and what validation read.

    Of several files, whole files are held out: which ones, the hash of their names decides, up to ``fraction`` of the
    bytes. Of a single text file it is the last part; of a single JSONL file it is documents spread evenly over it.

    Args:
        files: From :func:`find_files`. Binary ones are left out if there are others.
        fraction: Share of the text to hold out, strictly between 0 and 1.
        field: The field of a JSONL line that holds the text.

    Raises:
        ValueError: A single file is binary, or all are.
    """
    files = _text_files(files)
    if len(files) == 1:
        file = files[0]
        if _is_json_lines(file):
            return (
                [JsonLines(file.path, file.size, field, held_out=fraction)],
                [JsonLines(file.path, file.size, field, held_out=fraction, validation=True)],
            )
        cut = _character_boundary(file, file.size - round(file.size * fraction))
        return [Text(file.path, 0, cut)], [Text(file.path, cut, file.size)]

    room = fraction * sum(file.size for file in files)
    held_out = set()
    for file in sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest()):
        if file.size <= room:
            room -= file.size
            held_out.add(file)
    held_out = held_out or {min(files, key=lambda file: (file.size, file.name))}

    def source(file: SourceFile) -> Source:
        return JsonLines(file.path, file.size, field) if _is_json_lines(file) else Text(file.path, 0, file.size)

    train = [source(file) for file in files if file not in held_out]
    return train, [source(file) for file in files if file in held_out]


def _walk(root: Path, skip: frozenset[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith(".") and Path(folder, name).is_file())


def _is_json_lines(file: SourceFile) -> bool:
    return file.path.suffix == ".jsonl"


def _text_files(files: list[SourceFile]) -> list[SourceFile]:
    problems = {file: _why_binary(file) for file in files}
    text = [file for file in files if problems[file] is None]
    if not text:
        file, *others = files
        raise ValueError(
            f"{file.path} is not text: {problems[file]}."
            + (f" Nor are the {len(others)} other files of data.path." if others else "")
            + " A corpus is UTF-8 text or JSONL."
        )
    return text


def _why_binary(file: SourceFile) -> str | None:
    """What makes the file binary, None for text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with file.path.open("rb") as content:
            while block := content.read(_BLOCK):
                if b"\0" in block:
                    return "it holds NUL bytes"
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 ({error.reason})"
    return None


def _character_boundary(file: SourceFile, offset: int) -> int:
    """The first byte at or after ``offset`` that starts a UTF-8 character, or the end."""
    with file.path.open("rb") as content:
        content.seek(offset)
        following = content.read(3)
    return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))


def _is_held_out(number: int, fraction: float) -> bool:
    """Whether document ``number`` is one of an evenly spaced ``fraction``, of which document 1 is the first."""
    return math.ceil(number * fraction) > math.ceil((number - 1) * fraction)
