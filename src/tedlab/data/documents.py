"""Splits a corpus into training and validation, and reads the documents of its files.

Everything streams: no file is ever in memory as a whole. ``files.py`` finds the files, ``formats.py`` determines what
is in them, and ``corpus.py`` turns documents into tokens.
"""

import codecs
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from tedlab.data.files import LeftOut, SourceFile, find_files, listed
from tedlab.data.formats import BLOCK, LONGEST_LINE, Content, Unusable, examine, parse

__all__ = ["JsonLines", "Source", "Text", "find_files", "sources", "split"]

_BLOCK = BLOCK


class Source(Protocol):
    """The part of one file that one split reads."""

    @property
    def size(self) -> int:
        """Number of bytes that :meth:`documents` reads."""

    def documents(self, advance: Callable[[int], object]) -> Iterator[Iterable[str]]:
        """Yields each document as an iterable of blocks, to be consumed before the next document.

        ``advance`` is called with each number of bytes read.
        """


@dataclass(frozen=True)
class Text:
    """Bytes ``start`` to ``stop`` of a text file, which form one document."""

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
    """The documents of a JSONL file: the field ``field`` of each line from byte ``start`` on.

    ``held_out`` is the share of documents that is held out, and ``validation`` selects those rather than the others.
    With ``held_out=None`` all documents are read.
    """

    path: Path
    size: int
    field: str
    start: int = 0
    held_out: float | None = None
    validation: bool = False

    def documents(self, advance: Callable[[int], object]) -> Iterator[Iterable[str]]:
        number = -1  # index of the document; blank lines do not count
        line_number = 0
        with self.path.open("rb") as file:
            file.seek(self.start)
            while line := file.readline(LONGEST_LINE):
                line_number += 1
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    raise ValueError(
                        f"Line {line_number} of {self.path} is longer than {LONGEST_LINE:,} bytes. A line is one "
                        "document and is read as a whole: divide it, or write the text without JSON around it."
                    )
                advance(len(line))
                if not line.strip():
                    continue
                number += 1
                if self.held_out is None or _is_held_out(number, self.held_out) == self.validation:
                    yield [self._document(line, line_number)]

    def _document(self, line: bytes, line_number: int) -> str:
        where = f"Line {line_number} of {self.path}"
        try:
            row = parse(line)
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
        # examine() has found UTF-8 without NUL, so only an escape can produce these characters.
        if b"\\u" in line and ("\0" in text or any("\ud800" <= character <= "\udfff" for character in text)):
            raise ValueError(f"{where} holds NUL or half a surrogate pair in field {self.field!r}, which no text does.")
        return text


def split(
    files: list[SourceFile],
    fraction: float,
    field: str,
    left_out: list[LeftOut] | None = None,
    advance: Callable[[int], object] = lambda size: None,
) -> tuple[list[Source], list[Source]]:
    """Splits files into what training reads and what validation reads.

    Several files are held out as a whole, in an order given by the hash of their names, up to ``fraction`` of the
    bytes; files with the same content stay together. A single text file is cut, and its last part is held out. Of a
    single JSONL file, evenly spaced documents are held out.

    Args:
        files: Result of :func:`tedlab.data.files.find_files`. Unusable files are left out as long as one is usable.
        fraction: Share of the text to hold out, strictly between 0 and 1.
        field: Field of a JSONL line that holds the text.
        left_out: List that receives the files left out.
        advance: Called with each number of bytes read; every file is read from beginning to end.

    Returns:
        The sources of training and those of validation.

    Raises:
        ValueError: If no file can be used.
    """
    copies = _usable(files, field, left_out, advance)
    sizes = {group: sum(file.size for file, _ in group) for group in copies}
    if len(copies) == 1:
        (file, content), *others = copies[0]
        if left_out is not None:
            left_out += [LeftOut(other.name, f"it holds the same as {file.name}") for other, _ in others]
        if content.json_lines:
            lines = JsonLines(file.path, file.size, field, content.start, held_out=fraction)
            return [lines], [replace(lines, validation=True)]
        cut = _character_boundary(file, file.size - round((file.size - content.start) * fraction))
        return [Text(file.path, content.start, cut)], [Text(file.path, cut, file.size)]

    room = fraction * sum(sizes.values())
    held_out = set()
    for group in sorted(copies, key=lambda group: hashlib.sha256(group[0][0].name.encode()).digest()):
        if sizes[group] <= room:
            room -= sizes[group]
            held_out.add(group)
    held_out = held_out or {min(copies, key=lambda group: (sizes[group], group[0][0].name))}
    sides: tuple[list[_Member], list[_Member]] = ([], [])
    for group in copies:
        sides[group in held_out].extend(group)
    train, validation = (
        [_source(*member, field) for member in sorted(side, key=lambda member: member[0])] for side in sides
    )
    return train, validation


def sources(
    files: list[SourceFile],
    field: str,
    left_out: list[LeftOut] | None = None,
    advance: Callable[[int], object] = lambda size: None,
) -> list[Source]:
    """Returns what reads all documents of files; arguments and exceptions are those of :func:`split`."""
    members = (member for group in _usable(files, field, left_out, advance) for member in group)
    return [_source(*member, field) for member in sorted(members, key=lambda member: member[0])]


def _source(file: SourceFile, content: Content, field: str) -> Source:
    if content.json_lines:
        return JsonLines(file.path, file.size, field, content.start)
    return Text(file.path, content.start, file.size)


_Member = tuple[SourceFile, Content]
_Copies = tuple[_Member, ...]


def _usable(
    files: list[SourceFile], field: str, left_out: list[LeftOut] | None, advance: Callable[[int], object]
) -> list[_Copies]:
    """Examines files and groups the usable ones by content; groups and their members keep the order of ``files``."""
    groups: dict[bytes, list[_Member]] = {}
    unusable = []
    for file in files:
        try:
            content = examine(file, field, advance)
        except Unusable as reason:
            unusable.append(LeftOut(file.name, str(reason)))
        else:
            groups.setdefault(content.digest, []).append((file, content))
    if not groups:
        others = listed(unusable[1:])
        raise ValueError(
            f"{files[0].path} is not text: {unusable[0].reason}."
            + (f" Nor are the {len(unusable) - 1} other files of data.path ({others})." if others else "")
            + " A corpus is UTF-8 text or JSONL."
        )
    if left_out is not None:
        left_out += unusable
    return [tuple(group) for group in groups.values()]


def _character_boundary(file: SourceFile, offset: int) -> int:
    """Returns the offset of the first byte from ``offset`` on that starts a UTF-8 character, or the end of the file."""
    with file.path.open("rb") as content:
        content.seek(offset)
        following = content.read(3)
    return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))


def _is_held_out(number: int, fraction: float) -> bool:
    """Tells whether document ``number`` belongs to the evenly spaced ``fraction``, which begins with document 1."""
    return math.ceil(number * fraction) > math.ceil((number - 1) * fraction)
