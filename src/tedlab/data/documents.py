"""Splits a corpus into training and validation, and reads the documents of its files.

Everything streams: no file is ever in memory as a whole. ``files.py`` finds the files, ``formats.py`` determines what
is in them, and ``corpus.py`` turns documents into tokens.
"""

import codecs
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from tedlab.data import formats
from tedlab.data.files import LeftOut, SourceFile, find_files, listed
from tedlab.data.formats import BLOCK, Content, Kind, Unusable, examine
from tedlab.data.rows import JsonLines, SeparatedRows, TableRows
from tedlab.data.tokenised import is_index, open_tokens

__all__ = [
    "JsonLines",
    "SeparatedRows",
    "Source",
    "TableRows",
    "Text",
    "Tokens",
    "find_files",
    "sources",
    "split",
    "text_of",
]

_BLOCK = BLOCK
_TOKENS = 1 << 20  # of a document of tokens that are read at once
_OF_DATASETS = ("dataset_info.json", "state.json", "dataset_dict.json")  # beside the tables that datasets saves
Member = tuple[SourceFile, Content]
Copies = tuple[Member, ...]  # files of one content


class Source(Protocol):
    """The part of one file that one split reads."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def size(self) -> int:
        """Number of bytes that :meth:`documents` reads."""

    @property
    def ends(self) -> bool:
        """Whether its document ends here; otherwise it has one document, which the next part continues."""

    def documents(self, advance: Callable[[int], object]) -> Iterator[Iterable[str | np.ndarray]]:
        """Yields each document as an iterable of blocks of text or of tokens, to be consumed before the next document.

        ``advance`` is called with each number of bytes read.
        """

    def parts(self) -> "Iterator[Source]":
        """Divides the source into parts whose blocks are, one part after another, those of the source."""


@dataclass(frozen=True)
class Text:
    """Bytes ``start`` to ``stop`` of a text file, which form one document, or a part that others follow."""

    path: Path
    start: int
    stop: int
    ends: bool = True

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

    def parts(self) -> Iterator["Text"]:
        """Cuts where blocks end with a line, which are found without reading the blocks."""
        start = position = self.start
        with self.path.open("rb") as file:
            while position < self.stop:
                position = min(position + _BLOCK, self.stop)
                file.seek(position)
                line = file.readline(min(_BLOCK, self.stop - position))
                position += len(line)
                if position - start >= formats.PART and line.endswith(b"\n") and position < self.stop:
                    yield replace(self, start=start, stop=position, ends=False)
                    start = position
        yield replace(self, start=start)


@dataclass(frozen=True)
class Tokens:
    """Tokens ``start`` to ``stop`` (None: to the end) of a file that holds tokens, in whole documents."""

    path: Path
    start: int = 0
    stop: int | None = None
    ends = True

    @property
    def size(self) -> int:
        tokens = open_tokens(self.path).tokens
        return len(tokens[self.start : self.stop]) * tokens.dtype.itemsize

    def documents(self, advance: Callable[[int], object]) -> Iterator[Iterable[np.ndarray]]:
        file = open_tokens(self.path)
        stop = len(file.tokens) if self.stop is None else self.stop
        start = self.start
        for end in [stop] if file.ends is None else file.ends.tolist():
            if start < end <= stop:
                yield (file.tokens[first : min(first + _TOKENS, end)] for first in range(start, end, _TOKENS))
                advance((end - start) * file.tokens.dtype.itemsize)
                start = end

    def parts(self) -> Iterator["Tokens"]:
        yield self


def split(
    files: list[SourceFile],
    fraction: float,
    field: str,
    left_out: list[LeftOut] | None = None,
    advance: Callable[[int], object] = lambda size: None,
) -> tuple[list[Source], list[Source]]:
    """Splits files into what training reads and what validation reads.

    Several files are held out as a whole, in an order given by the hash of their names, up to ``fraction`` of the
    bytes; files with the same content stay together. A single text file is cut, and its last part is held out; one of
    tokens is cut between documents. Of a single JSONL file or table, evenly spaced documents are held out.

    Args:
        files: Result of :func:`tedlab.data.files.find_files`. Unusable files are left out as long as one is usable.
        fraction: Share of the text to hold out, strictly between 0 and 1.
        field: Field of a JSONL line, or column of a table, that holds the text.
        left_out: List that receives the files left out.
        advance: Called with each number of bytes read; every file is read from beginning to end.

    Returns:
        The sources of training and those of validation.

    Raises:
        ValueError: If no file can be used.
    """
    copies = usable(files, field, left_out, advance)
    if left_out is not None:
        left_out += not_read(copies)
    return divided(copies, fraction, field)


def divided(copies: Sequence[Copies], fraction: float, field: str) -> tuple[list[Source], list[Source]]:
    """Splits what :func:`usable` has found as :func:`split` does."""
    sizes = {group: sum(file.size for file, _ in group) for group in copies}
    if len(copies) == 1:
        file, content = copies[0][0]
        source = _source(file, content, field)
        if isinstance(source, (JsonLines, SeparatedRows, TableRows)):
            source = replace(source, held_out=fraction)
            return [source], [replace(source, validation=True)]
        if isinstance(source, Tokens):
            place = document_cut(open_tokens(file.path).ends, fraction)
            return [replace(source, stop=place)], [replace(source, start=place)]
        cut = _character_boundary(file, file.size - round((file.size - content.start) * fraction))
        return [Text(file.path, content.start, cut)], [Text(file.path, cut, file.size)]

    room = fraction * sum(sizes.values())
    held_out = set()
    for group in sorted(copies, key=lambda group: hashlib.sha256(group[0][0].name.encode()).digest()):
        if sizes[group] <= room:
            room -= sizes[group]
            held_out.add(group)
    held_out = held_out or {min(copies, key=lambda group: (sizes[group], group[0][0].name))}
    sides: tuple[list[Member], list[Member]] = ([], [])
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
    members = (member for group in usable(files, field, left_out, advance) for member in group)
    return [_source(*member, field) for member in sorted(members, key=lambda member: member[0])]


def text_of(source: Source, advance: Callable[[int], object] = lambda size: None) -> Iterator[Iterable[str]]:
    """Yields each document of a source as blocks of text.

    Raises:
        ValueError: If the source holds tokens.
    """
    for document in source.documents(advance):
        yield (_text(block, source) for block in document)


def _text(block: str | np.ndarray, source: Source) -> str:
    if not isinstance(block, str):
        raise ValueError(f"{source.path} holds tokens, but text is needed here.")
    return block


def document_cut(ends: np.ndarray | None, fraction: float) -> int:
    """Returns the first end of a document that leaves at most about ``fraction`` of the tokens after it, but some.

    Args:
        ends: How many tokens there are up to the end of each document, int64, shape (documents,).
        fraction: Share of the tokens to hold out.

    Raises:
        ValueError: If there is one document alone.
    """
    if ends is None or len(ends) < 2:
        raise ValueError("A file of tokens with one document alone cannot be divided into training and validation.")
    place = int(np.searchsorted(ends, ends[-1] * (1 - fraction)))
    return int(ends[min(place, len(ends) - 2)])


def _source(file: SourceFile, content: Content, field: str) -> Source:
    match content.kind:
        case Kind.JSON_LINES:
            return JsonLines(file.path, file.size, field, content.start, compression=content.compression)
        case Kind.SEPARATED:
            assert content.header is not None
            compression, lines = content.compression, content.header.lines
            return SeparatedRows(
                file.path, file.size, field, content.start, None, False, compression, None, lines, header=content.header
            )
        case Kind.TABLE:
            return TableRows(file.path, file.size, field, content.rows, 0, len(content.rows))
        case Kind.TOKENS:
            return Tokens(file.path)
        case _:
            return Text(file.path, content.start, file.size)


def usable(
    files: list[SourceFile], field: str, left_out: list[LeftOut] | None, advance: Callable[[int], object]
) -> list[Copies]:
    """Examines files and groups the usable ones by content; groups and their members keep the order of ``files``.

    Arguments and exceptions are those of :func:`split`.
    """
    groups: dict[bytes, list[Member]] = {}
    unusable = []
    saved_by_datasets = {file.path.parent for file in files if file.path.suffix == ".arrow"}
    saved_by_datasets |= {folder.parent for folder in saved_by_datasets}
    for file in files:
        if is_index(file.path) or (file.path.name in _OF_DATASETS and file.path.parent in saved_by_datasets):
            continue
        try:
            content = examine(file, field, advance)
        except Unusable as reason:
            unusable.append(LeftOut(file.name, str(reason)))
        else:
            groups.setdefault(content.digest, []).append((file, content))
    if not groups:
        others = listed(unusable[1:])
        if len({file.reason for file in unusable}) == 1:
            others = others and "for the same reason"
        raise ValueError(
            f"{files[0].path} cannot be used: {unusable[0].reason}."
            + (f" Nor can the {len(unusable) - 1} other files of data.path ({others})." if others else "")
            + " A corpus is UTF-8 text, JSONL, CSV, Parquet, Arrow or tokens (docs/data.md)."
        )
    if left_out is not None:
        left_out += unusable
    return [tuple(group) for group in groups.values()]


def not_read(copies: Sequence[Copies]) -> list[LeftOut]:
    """Returns the files that a split does not read: the others of one content, if all have one."""
    if len(copies) > 1:
        return []
    (first, _), *others = copies[0]
    return [LeftOut(other.name, f"it holds the same as {first.name}") for other, _ in others]


def _character_boundary(file: SourceFile, offset: int) -> int:
    """Returns the offset of the first byte from ``offset`` on that starts a UTF-8 character, or the end of the file."""
    with file.path.open("rb") as content:
        content.seek(offset)
        following = content.read(3)
    return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))
