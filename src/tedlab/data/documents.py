"""What of a corpus is held out, and the documents that its files hold.

Everything streams: no file is ever read as a whole. Which files there are is found out in ``files.py``, what is in them
in ``formats.py``. Turning documents into tokens is ``corpus.py``'s job.
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

__all__ = ["JsonLines", "Source", "Text", "find_files", "split"]

_BLOCK = BLOCK


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
    """One document per line of a JSONL file from byte ``start`` on, from the field ``field``.

    ``held_out`` is the share of lines that is held out and ``validation`` says which side this is; None is all lines.
    """

    path: Path
    size: int
    field: str
    start: int = 0
    held_out: float | None = None
    validation: bool = False

    def documents(self, advance: Callable[[int], object]) -> Iterator[Iterable[str]]:
        number = -1  # of the document; blank lines are none
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
        # The file itself is UTF-8 without NUL, so that only an escape can give these.
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
    """What training and what validation read.

    Of several files, whole files are held out: which ones, the hash of their names decides, up to ``fraction`` of the
    bytes. Files with the same content are held out together or not at all. Of a single text file it is the last part;
    of a single JSONL file it is documents spread evenly over it.

    Args:
        files: From :func:`tedlab.data.files.find_files`. Those that cannot be used are left out if there are others.
        fraction: Share of the text to hold out, strictly between 0 and 1.
        field: The field of a JSONL line that holds the text.
        left_out: Gets the files that were left out.
        advance: Is told the bytes as they are read: all files are read as a whole.

    Raises:
        ValueError: A single file cannot be used, or none can.
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


def _source(file: SourceFile, content: Content, field: str) -> Source:
    if content.json_lines:
        return JsonLines(file.path, file.size, field, content.start)
    return Text(file.path, content.start, file.size)


_Member = tuple[SourceFile, Content]
_Copies = tuple[_Member, ...]


def _usable(
    files: list[SourceFile], field: str, left_out: list[LeftOut] | None, advance: Callable[[int], object]
) -> list[_Copies]:
    """What can be trained on: those with the same content together, by name, and each such group by its first name."""
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
    """The first byte at or after ``offset`` that starts a UTF-8 character, or the end."""
    with file.path.open("rb") as content:
        content.seek(offset)
        following = content.read(3)
    return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))


def _is_held_out(number: int, fraction: float) -> bool:
    """Whether document ``number`` is one of an evenly spaced ``fraction``, of which document 1 is the first."""
    return math.ceil(number * fraction) > math.ceil((number - 1) * fraction)
