"""Reads documents that are rows: lines of JSON, rows of CSV or TSV, and rows of Parquet and Arrow tables.

``formats.py`` has determined what a file holds. Each class reads what one split has of a file, as a stream.
"""

import csv
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Generic, NamedTuple, Self, TypeVar

from typing_extensions import override

from tedlab.data import formats, tables
from tedlab.data.compressed import opened
from tedlab.data.formats import Header, parse

Parsed = TypeVar("Parsed")


class Row(NamedTuple, Generic[Parsed]):
    """A row as it stands in its file.

    Attributes:
        line: The number of its first line, from 1.
        start: Where that begins, in bytes.
        size: Number of its bytes.
        content: What is parsed further; None for a blank line, which is no row.
    """

    line: int
    start: int
    size: int
    content: Parsed | None


@dataclass(frozen=True)
class Lines(ABC, Generic[Parsed]):
    """Documents that are rows of one or more lines: the column ``field`` of those from byte ``start`` to ``stop``.

    ``held_out`` is the share of documents that is held out, and ``validation`` selects those rather than the others.
    With ``held_out=None`` all documents are read. ``stop=None`` means the end of the file; ``lines`` and ``rows`` are
    the numbers of lines and of documents before ``start``. ``size`` is that of the bytes read, which ``compression``
    may have made fewer.
    """

    path: Path
    size: int
    field: str
    start: int = 0
    held_out: float | None = None
    validation: bool = False
    compression: str | None = None
    stop: int | None = None
    lines: int = 0
    rows: int = 0
    ends = True

    def documents(self, advance: Callable[[int], object]) -> Iterator[Iterable[str]]:
        number = self.rows - 1  # index of the document; blank lines do not count
        for row in self._rows():
            advance(row.size if self.compression is None else 0)
            if row.content is None:
                continue
            number += 1
            if self.held_out is None or is_held_out(number, self.held_out) == self.validation:
                yield [self._text(row.content, row.line)]
        advance(0 if self.compression is None else self.size)

    def parts(self) -> Iterator[Self]:
        """Cuts between rows. What is compressed cannot be read from its middle, and stays whole."""
        if self.compression is not None or self.size <= formats.PART:
            yield self
            return
        begun = replace(self, size=0)
        rows = 0
        for row in self._rows():
            if row.start - begun.start >= formats.PART:
                yield replace(begun, stop=row.start, size=row.start - begun.start)
                begun = replace(begun, start=row.start, lines=row.line - 1, rows=self.rows + rows)
            rows += row.content is not None
        yield replace(begun, size=self.path.stat().st_size - begun.start)

    def _rows(self) -> Iterator[Row[Parsed]]:
        with opened(self.path, self.compression) as file:
            if self.compression is None:
                file.seek(self.start)
            else:
                file.read(self.start)
            yield from self._read(file)

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        """Yields the lines up to ``stop``; the last may lack its end.

        Raises:
            ValueError: If one is longer than memory might hold.
        """
        number, offset = self.lines, self.start
        while (self.stop is None or offset < self.stop) and (line := file.readline(formats.LONGEST_LINE)):
            number += 1
            offset += len(line)
            if len(line) == formats.LONGEST_LINE and not line.endswith(b"\n"):
                raise ValueError(
                    f"Line {number} of {self.path} is longer than {formats.LONGEST_LINE:,} bytes. A line is one "
                    "document and is read as a whole: divide it, or write the text without anything around it."
                )
            yield line

    @abstractmethod
    def _read(self, file: BinaryIO) -> Iterator[Row[Parsed]]:
        """Yields the rows of a file that is open at ``start``."""

    @abstractmethod
    def _text(self, content: Parsed, line: int) -> str:
        """Returns the text of the row that begins with this line.

        Raises:
            ValueError: If there is none.
        """


@dataclass(frozen=True)
class JsonLines(Lines[bytes]):
    """The documents of a JSONL file: the field ``field`` of each line, see :class:`Lines`."""

    @override
    def _read(self, file: BinaryIO) -> Iterator[Row[bytes]]:
        number, offset = self.lines, self.start
        for line in self._lines(file):
            number += 1
            yield Row(number, offset, len(line), line if line.strip() else None)
            offset += len(line)

    @override
    def _text(self, content: bytes, line: int) -> str:
        where = f"Line {line} of {self.path}"
        try:
            row = parse(content)
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
        if b"\\u" in content and ("\0" in text or any("\ud800" <= character <= "\udfff" for character in text)):
            raise ValueError(f"{where} holds NUL or half a surrogate pair in field {self.field!r}, which no text does.")
        return text


@dataclass(frozen=True, kw_only=True)
class SeparatedRows(Lines[list[str]]):
    """The documents of a CSV or TSV file: the column ``field`` of each row after the header, see :class:`Lines`."""

    header: Header

    @override
    def _read(self, file: BinaryIO) -> Iterator[Row[list[str]]]:
        number, offset = self.lines + 1, self.start
        lines = size = 0  # of the row that is being read

        def noted() -> Iterator[str]:
            nonlocal lines, size
            for line in self._lines(file):
                lines, size = lines + 1, size + len(line)
                yield line.decode()

        try:
            for fields in formats.separated(noted(), self.header.separator):
                yield Row(number, offset, size, fields or None)
                number, offset = number + lines, offset + size
                lines = size = 0
        except csv.Error as error:
            raise ValueError(f"Line {number} of {self.path} begins no row of a table ({error}).") from None

    @override
    def _text(self, content: list[str], line: int) -> str:
        columns = self.header.columns
        if len(content) != len(columns):
            raise ValueError(
                f"The row in line {line} of {self.path} has {len(content)} fields, but the header has {len(columns)}. "
                f"Quote fields with {self.header.separator!r} in them."
            )
        return content[columns.index(self.field)]


@dataclass(frozen=True)
class TableRows:
    """The documents of a Parquet or Arrow file: the column ``field`` of the rows in the pieces ``start`` to ``stop``.

    ``pieces`` has the number of rows in each piece of the file. ``held_out`` and ``validation`` are as for
    :class:`Lines`.
    """

    path: Path
    size: int
    field: str
    pieces: tuple[int, ...]
    start: int
    stop: int
    held_out: float | None = None
    validation: bool = False
    ends = True

    def documents(self, advance: Callable[[int], object]) -> Iterator[Iterable[str]]:
        for row, text in tables.texts(self.path, self.field, self.start, self.stop):
            if self.held_out is None or is_held_out(row - 1, self.held_out) == self.validation:
                yield [checked_text(text, f"Row {row} of {self.path}", self.field)]
        advance(self.size)

    def parts(self) -> Iterator["TableRows"]:
        """Cuts between the pieces that can be read alone."""
        rows = sum(self.pieces[self.start : self.stop])
        first = self.start
        for piece in range(self.start, self.stop):
            size = self.size * sum(self.pieces[first : piece + 1]) // rows
            if size >= formats.PART or piece == self.stop - 1:
                yield replace(self, start=first, stop=piece + 1, size=size)
                first = piece + 1


def checked_text(value: object, where: str, column: str) -> str:
    """Returns a value of a table's column if it is text.

    Raises:
        ValueError: If it is not; the message begins with ``where``.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where} holds a {type(value).__name__} in column {column!r}, not text.")
    if "\0" in value:
        raise ValueError(f"{where} holds NUL in column {column!r}, which no text does.")
    return value


def is_held_out(number: int, fraction: float) -> bool:
    """Tells whether document ``number`` belongs to the evenly spaced ``fraction``, which begins with document 1."""
    return math.ceil(number * fraction) > math.ceil((number - 1) * fraction)
