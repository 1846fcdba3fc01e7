"""Determines what a file of the corpus holds by reading all of it: text, JSON lines, tables, tokens, or nothing.

The caller decides what becomes of an unusable file: alone it is an error, among others it is left out. ``compressed``,
``tables`` and ``tokenised`` read what is not plain UTF-8.
"""

import codecs
import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, BinaryIO, NamedTuple

from tedlab.data import compressed, tables, tokenised
from tedlab.data.extra import MissingExtra
from tedlab.data.files import SourceFile, cannot_be_read

BLOCK = 1 << 20  # bytes per read
PART = 8 << 20  # bytes of a source that are tokenised at once, about
LONGEST_LINE = 1 << 28  # bytes; a line of JSON must fit into memory as a whole
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")  # such files hold JSON lines, whatever their content looks like
SEPARATORS = {".csv": ",", ".tsv": "\t"}  # such files hold rows of fields, the first of which names the columns
_BYTE_ORDER_MARK = codecs.BOM_UTF8
_PDF = b"%PDF-"
_MAGIC = {  # first bytes of a file → advice more useful than "not UTF-8"
    b"BZh": "compressed by bzip2; decompress it first (bunzip2)",
    b"\xfd7zXZ\0": "compressed by xz; decompress it first (unxz)",
    b"\x04\x22\x4d\x18": "compressed by lz4; decompress it first (unlz4)",
    b"PK\x03\x04": "a ZIP archive; unpack it first (unzip)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"Obj\x01": "an Avro table; write the column that holds the text as JSON lines",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file; write the text as UTF-8",
    b"SQLite format 3\0": "an SQLite database; write the column that holds the text as JSON lines",
    _PDF: "a PDF; extract its text first (pdftotext)",
    b"\xff\xfe": "UTF-16 or UTF-32; convert it to UTF-8 (iconv)",
    b"\xfe\xff": "UTF-16; convert it to UTF-8 (iconv)",
    b"\0\0\xfe\xff": "UTF-32; convert it to UTF-8 (iconv)",
}


class Unusable(Exception):
    """A file cannot be used; the message is a clause that begins with "it" and says why."""


Kind = StrEnum("Kind", "TEXT JSON_LINES SEPARATED TABLE TOKENS")


class Header(NamedTuple):
    """The first row of a table as text.

    Attributes:
        separator: What stands between fields.
        columns: The names of the columns.
        lines: How many lines the header has, and blank ones before it.
    """

    separator: str
    columns: tuple[str, ...]
    lines: int


@dataclass(frozen=True)
class Content:
    """The content of a usable file.

    Attributes:
        kind: Plain text, lines that are each a JSON object with text in a field, a table with a column of text, as text
            itself or in binary, or tokens.
        start: Byte offset where the content begins, after a byte-order mark and a header.
        digest: Hash of all bytes of the file, of those that it decompresses to if it is compressed.
        compression: ``gzip``, ``zstd`` or None.
        rows: Of a binary table, the number of rows in each of its pieces.
        header: Of a table as text, its header.
    """

    kind: Kind
    start: int
    digest: bytes
    compression: str | None = None
    rows: tuple[int, ...] = ()
    header: Header | None = None


def examine(file: SourceFile, field: str, advance: Callable[[int], object] = lambda size: None) -> Content:
    """Reads a file from beginning to end, in blocks of ``BLOCK`` bytes, and determines its content.

    Args:
        file: A regular file.
        field: Field of a JSON line, or column of a table, that holds the text.
        advance: Called with each number of bytes read.

    Raises:
        Unusable: If the file cannot be read, is neither UTF-8 text nor JSON lines nor a table nor tokens, or has a
            format whose syntax the model would learn along with the text.
    """
    try:
        if tokenised.holds_tokens(file.path):
            tokenised.open_tokens(file.path)
            return Content(Kind.TOKENS, 0, _digest(file, advance))
        with file.path.open("rb") as content:
            head = content.read(64)
        binary = not _is_ascii(head)  # text may begin with "PAR1", too
        if binary and head.startswith((tables.PARQUET, tables.ARROW, tables.STREAM)):
            return _table(file, field, advance)
        compression = next((name for magic, name in compressed.MAGIC.items() if head.startswith(magic)), None)
        head, digest = _read(file, compression, advance)
        start = len(_BYTE_ORDER_MARK) if head.startswith(_BYTE_ORDER_MARK) else 0
        if head[start:] and (separator := SEPARATORS.get(_suffix(file, compression))):
            start, header = _header(file, compression, separator, start, field)
            return Content(Kind.SEPARATED, start, digest, compression, header=header)
        json_lines = _is_json_lines(file, compression, head, start, field)
    except OSError as error:
        raise Unusable(cannot_be_read(error)) from None
    except (tokenised.DamagedTokens, compressed.LongWindow) as error:
        raise Unusable(f"{error}") from None
    except compressed.Damaged as error:
        raise Unusable(f"it is compressed and damaged ({error})") from None
    except MissingExtra as error:
        raise Unusable(f"it cannot be read: {error}") from None
    if not head[start:]:
        raise Unusable("it holds a byte-order mark and nothing else" if start else "it holds nothing")
    if compression is not None and not json_lines:
        tool = {"gzip": "gunzip", "zstd": "unzstd"}[compression]
        raise Unusable(
            f"it is compressed by {compression} and neither JSON lines nor CSV; decompress it first ({tool})"
        )
    return Content(Kind.JSON_LINES if json_lines else Kind.TEXT, start, digest, compression)


def _table(file: SourceFile, field: str, advance: Callable[[int], object]) -> Content:
    try:
        table = tables.describe(file.path)
    except MissingExtra:
        raise
    except ValueError as error:
        raise Unusable(f"{error}".replace(f"{file.path} is", "it is", 1)) from None
    if field not in table.columns:
        columns = ", ".join(map(repr, table.columns)) or "none at all"
        raise Unusable(f"it is a table without a column data.field={field!r} (its columns are {columns})")
    if not tables.is_text(table.columns[field]):
        raise Unusable(f"it is a table whose column {field!r} holds {table.columns[field]}, not text")
    if not sum(table.rows):
        raise Unusable("it is a table without rows")
    return Content(Kind.TABLE, 0, _digest(file, advance), rows=table.rows)


def separated(lines: Iterable[str], separator: str) -> Iterator[list[str]]:
    """Yields the fields of each row of a table as text, as RFC 4180 has them; none for a blank line.

    Raises:
        csv.Error: If quotes are not closed, or something stands behind them.
    """
    csv.field_size_limit(LONGEST_LINE)
    return csv.reader(lines, delimiter=separator, strict=True)


def _header(file: SourceFile, compression: str | None, separator: str, start: int, field: str) -> tuple[int, Header]:
    """Returns where the header of a table ends, and the header."""
    lines: list[bytes] = []

    def noted(content: BinaryIO) -> Iterator[str]:
        while line := content.readline(LONGEST_LINE):
            lines.append(line)
            yield line.decode()

    try:
        with compressed.opened(file.path, compression) as content:
            content.read(start)
            columns = tuple(next(filter(None, separated(noted(content), separator)), ()))
            empty = not any(line.strip() for line in iter(lambda: content.readline(LONGEST_LINE), b""))
    except (csv.Error, UnicodeDecodeError) as error:  # a line that is too long may be cut in a character
        raise Unusable(f"by its name it is a table, but it begins with no header ({error})") from None
    if columns.count(field) != 1:
        listed = ", ".join(map(repr, columns)) or "none at all"
        which = "with several columns" if field in columns else "without a column"
        raise Unusable(
            f"it is a table {which} data.field={field!r} (its columns, divided by {separator!r}, are {listed})"
        )
    if empty:
        raise Unusable("it is a table without rows")
    return start + sum(map(len, lines)), Header(separator, columns, len(lines))


def _digest(file: SourceFile, advance: Callable[[int], object]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with file.path.open("rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.digest()


def parse(line: bytes) -> Any:
    """Parses a line of JSON; raises ``ValueError`` with what is wrong."""
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _read(file: SourceFile, compression: str | None, advance: Callable[[int], object]) -> tuple[bytes, bytes]:
    """Returns the first block and the digest of a file, after checking that it is UTF-8 without NUL."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    digest = hashlib.blake2b(digest_size=16)
    head = b""
    with compressed.opened(file.path, compression) as content:
        while block := content.read(BLOCK):
            if not head:
                head = block
                _refuse_known(head)
            if b"\0" in block:
                raise Unusable("it holds NUL bytes")
            digest.update(block)
            advance(len(block) if compression is None else 0)
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                raise Unusable(f"it is not UTF-8 ({error.reason})") from None
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise Unusable(f"it is not UTF-8 ({error.reason})") from None
    advance(0 if compression is None else file.size)
    return head, digest.digest()


def _refuse_known(head: bytes) -> None:
    for magic, what in _MAGIC.items():
        if head.startswith(magic) and (magic == _PDF or not _is_ascii(head[:64])):  # text may begin with "PAR1", too
            raise Unusable(f"it is {what}")


def _is_ascii(head: bytes) -> bool:
    return all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head)


def _suffix(file: SourceFile, compression: str | None) -> str:
    """Returns how the name of a file ends, or would if it were not compressed."""
    suffixes = [suffix.lower() for suffix in file.path.suffixes]
    if suffixes and compression is not None and suffixes[-1] in compressed.SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _is_json_lines(file: SourceFile, compression: str | None, head: bytes, start: int, field: str) -> bool:
    """Decides by the file's name, or else by its first two lines that are not blank."""
    suffix = _suffix(file, compression)
    if suffix in JSON_LINES:
        return True
    begins_so = head[start:].lstrip().startswith(b"{")
    rows = _first_rows(file, compression, start) if begins_so else []
    if suffix == ".json":
        if not rows or rows[0] is None:
            raise Unusable(
                "it is JSON, whose syntax would be trained on, but not one object per line (jq -c '.[]' makes such "
                "lines of a list)"
            )
    elif None in rows or not rows or (len(rows) == 1 and field not in (rows[0] or {})):
        return False  # plain text that begins with a brace
    if field not in (rows[0] or {}):
        fields = ", ".join(map(repr, rows[0] or {})) or "none at all"
        raise Unusable(f"it holds JSON lines without data.field={field!r} (those of the first are {fields})")
    return True


def _first_rows(file: SourceFile, compression: str | None, start: int) -> list[dict[str, Any] | None]:
    """Parses the first two lines that are not blank; gives None for a line that is not a JSON object."""
    rows: list[dict[str, Any] | None] = []
    with compressed.opened(file.path, compression) as content:
        content.read(start)
        while len(rows) < 2 and (line := content.readline(LONGEST_LINE)):
            if line.strip():
                try:
                    row = parse(line)
                except ValueError:
                    row = None
                rows.append(row if isinstance(row, dict) else None)
    return rows
