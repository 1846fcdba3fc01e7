"""Determines what a file of the corpus holds by reading all of it: text, JSON lines, or nothing usable.

The caller decides what becomes of an unusable file: alone it is an error, among others it is left out.
"""

import codecs
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tedlab.data.files import SourceFile, cannot_be_read

BLOCK = 1 << 20  # bytes per read
LONGEST_LINE = 1 << 28  # bytes; a line of JSON must fit into memory as a whole
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")  # such files hold JSON lines, whatever their content looks like
_TABLES = (".csv", ".tsv")
_BYTE_ORDER_MARK = codecs.BOM_UTF8
_PDF = b"%PDF-"
_MAGIC = {  # first bytes of a file → advice more useful than "not UTF-8"
    b"\x1f\x8b": "compressed by gzip; decompress it first (gunzip)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; decompress it first (unzstd)",
    b"BZh": "compressed by bzip2; decompress it first (bunzip2)",
    b"\xfd7zXZ\0": "compressed by xz; decompress it first (unxz)",
    b"\x04\x22\x4d\x18": "compressed by lz4; decompress it first (unlz4)",
    b"PK\x03\x04": "a ZIP archive; unpack it first (unzip)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"PAR1": "a Parquet table; write the column that holds the text as JSON lines",
    b"ARROW1": "an Arrow table; write the column that holds the text as JSON lines",
    b"Obj\x01": "an Avro table; write the column that holds the text as JSON lines",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file; write the text as UTF-8",
    b"\x93NUMPY": "a NumPy array; write the text as UTF-8",
    b"SQLite format 3\0": "an SQLite database; write the column that holds the text as JSON lines",
    _PDF: "a PDF; extract its text first (pdftotext)",
    b"\xff\xfe": "UTF-16 or UTF-32; convert it to UTF-8 (iconv)",
    b"\xfe\xff": "UTF-16; convert it to UTF-8 (iconv)",
    b"\0\0\xfe\xff": "UTF-32; convert it to UTF-8 (iconv)",
}


class Unusable(Exception):
    """A file cannot be used; the message is a clause that begins with "it" and says why."""


@dataclass(frozen=True)
class Content:
    """The content of a usable file.

    Attributes:
        json_lines: Whether each line is a JSON object that holds text in a field; otherwise the file is plain text.
        start: Byte offset where the content begins, after a byte-order mark.
        digest: Hash of all bytes of the file.
    """

    json_lines: bool
    start: int
    digest: bytes


def examine(file: SourceFile, field: str, advance: Callable[[int], object] = lambda size: None) -> Content:
    """Reads a file from beginning to end, in blocks of ``BLOCK`` bytes, and determines its content.

    Args:
        file: A regular file.
        field: Field of a JSON line that holds the text.
        advance: Called with each number of bytes read.

    Raises:
        Unusable: If the file cannot be read, is neither UTF-8 text nor JSON lines, or has a format whose syntax the
            model would learn along with the text.
    """
    try:
        head, digest = _read(file, advance)
        start = len(_BYTE_ORDER_MARK) if head.startswith(_BYTE_ORDER_MARK) else 0
        json_lines = _is_json_lines(file, head, start, field)
    except OSError as error:
        raise Unusable(cannot_be_read(error)) from None
    if start == file.size:
        raise Unusable("it holds a byte-order mark and nothing else")
    return Content(json_lines, start, digest)


def parse(line: bytes) -> Any:
    """Parses a line of JSON; raises ``ValueError`` with what is wrong."""
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _read(file: SourceFile, advance: Callable[[int], object]) -> tuple[bytes, bytes]:
    """Returns the first block and the digest of a file, after checking that it is UTF-8 without NUL."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    digest = hashlib.blake2b(digest_size=16)
    head = b""
    with file.path.open("rb") as content:
        while block := content.read(BLOCK):
            if not head:
                head = block
                _refuse_known(head)
            if b"\0" in block:
                raise Unusable("it holds NUL bytes")
            digest.update(block)
            advance(len(block))
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                raise Unusable(f"it is not UTF-8 ({error.reason})") from None
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise Unusable(f"it is not UTF-8 ({error.reason})") from None
    return head, digest.digest()


def _refuse_known(head: bytes) -> None:
    for magic, what in _MAGIC.items():
        if head.startswith(magic) and (magic == _PDF or not _is_ascii(head[:64])):  # text may begin with "PAR1", too
            raise Unusable(f"it is {what}")


def _is_ascii(head: bytes) -> bool:
    return all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head)


def _is_json_lines(file: SourceFile, head: bytes, start: int, field: str) -> bool:
    """Decides by the file's name, or else by its first two lines that are not blank."""
    suffix = file.path.suffix.lower()
    if suffix in JSON_LINES:
        return True
    if suffix in _TABLES:
        raise Unusable(
            "by its name it is a table, whose syntax would be trained on; write the column that holds the text as JSON "
            "lines"
        )
    begins_so = head[start:].lstrip().startswith(b"{")
    rows = _first_rows(file, start) if begins_so else []
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
        raise Unusable(f"it holds JSON lines without a field {field!r} (those of the first are {fields})")
    return True


def _first_rows(file: SourceFile, start: int) -> list[dict[str, Any] | None]:
    """Parses the first two lines that are not blank; gives None for a line that is not a JSON object."""
    rows: list[dict[str, Any] | None] = []
    with file.path.open("rb") as content:
        content.seek(start)
        while len(rows) < 2 and (line := content.readline(LONGEST_LINE)):
            if line.strip():
                try:
                    row = parse(line)
                except ValueError:
                    row = None
                rows.append(row if isinstance(row, dict) else None)
    return rows
