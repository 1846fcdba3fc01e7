"""Reads the texts in a column of a Parquet or Arrow file, piece by piece, through pyarrow.

Arrow files are those of either kind that pyarrow writes: files, and streams, which Hugging Face ``datasets`` saves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tedlab.data.extra import needed

PARQUET, ARROW, STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"  # first bytes
_ROWS = 1024  # read at a time


class Table(NamedTuple):
    """What a file says about itself.

    Attributes:
        columns: The name and type of each column.
        rows: Number of rows in each of the pieces that can be read alone.
    """

    columns: dict[str, str]
    rows: tuple[int, ...]


def describe(path: Path) -> Table:
    """Reads what a file says about itself, and of its rows nothing.

    Raises:
        MissingExtra: If pyarrow is not installed.
        ValueError: If the file is damaged.
    """
    with _opened(path) as table:
        columns = {field.name: str(field.type) for field in table.schema}
        return Table(columns, table.rows)


def texts(path: Path, column: str, start: int, stop: int) -> Iterator[tuple[int, object]]:
    """Yields each value of a column with the number of its row, from 1 on, in the pieces ``start`` to ``stop``.

    Raises:
        ValueError: If the file is damaged.
    """
    with _opened(path) as table:
        row = sum(table.rows[:start])
        for values in table.values(column, start, stop):
            for value in values:
                row += 1
                yield row, value


def is_text(kind: str) -> bool:
    """Tells whether the values of an Arrow type, as pyarrow writes it, are text."""
    return kind in ("string", "large_string", "string_view") or kind.startswith("dictionary<values=string")


@contextmanager
def _opened(path: Path) -> Iterator["_Parquet | _Arrow"]:
    arrow = needed("pyarrow", "a Parquet or Arrow table")
    try:
        with path.open("rb") as file:
            head = file.read(len(ARROW))
        if head.startswith(PARQUET):
            with needed("pyarrow.parquet", "a Parquet table").ParquetFile(
                path, memory_map=True, page_checksum_verification=True
            ) as table:
                yield _Parquet(table)
        else:
            with arrow.memory_map(str(path)) as file:
                yield _Arrow(file, head == ARROW)
    except (arrow.ArrowInvalid, arrow.ArrowKeyError, OSError, EOFError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path} is a damaged table ({' '.join(f'{error}'.split()).rstrip('.')})") from None


class _Parquet:
    def __init__(self, table: Any) -> None:
        self._table, self.schema = table, table.schema_arrow
        groups = range(table.metadata.num_row_groups)
        self.rows = tuple(table.metadata.row_group(n).num_rows for n in groups)

    def values(self, column: str, start: int, stop: int) -> Iterator[list[Any]]:
        groups = list(range(start, stop))
        for batch in self._table.iter_batches(_ROWS, row_groups=groups, columns=[column]) if groups else ():
            yield batch.column(0).to_pylist()


class _Arrow:
    def __init__(self, file: Any, seekable: bool) -> None:
        ipc = needed("pyarrow.ipc", "an Arrow table")
        reader = ipc.open_file(file) if seekable else ipc.open_stream(file)
        self.schema = reader.schema
        # A stream has no index of its batches. They are mapped, not read.
        self._batches = [reader.get_batch(n) for n in range(reader.num_record_batches)] if seekable else [*reader]
        self.rows = tuple(batch.num_rows for batch in self._batches)

    def values(self, column: str, start: int, stop: int) -> Iterator[list[Any]]:
        for batch in self._batches[start:stop]:
            texts = batch.column(self.schema.get_field_index(column))
            texts.validate(full=True)  # what is mapped may say that its texts lie where no memory is
            for first in range(0, len(texts), _ROWS):
                yield texts.slice(first, _ROWS).to_pylist()
