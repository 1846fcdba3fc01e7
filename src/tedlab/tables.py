"""Tables that fit where they are printed: figures stay whole, words wrap, and what is still too wide is divided."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Column, Table
from rich.text import Text
from typing_extensions import override

_WORD = 24  # a longer word in a cell, such as a path, may be broken
_HEADING = 32  # a longer word in a heading, such as a setting's name
_TIGHT = (0, 0, 0, 0)


class _Span(NamedTuple):
    """The widths of a column: the least, that in which no cell is wrapped, and the most that it can use."""

    least: int
    cells: int
    most: int


class FittingTable(Table):
    """A table of texts whose columns to the right are figures, which are never wrapped or cut.

    Where there is too little room, headings are wrapped, then words, the widest columns first, and then cells lose
    their padding. If that is not enough, it is printed as several tables, one below the other, which all begin with its
    first columns of words. The title and the caption begin at the left, and are as wide as the console.
    """

    @override
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, part in enumerate(self._divided(options.max_width)):
            if self.title:
                yield Text(f"{self.title}{' (continued)' * (number > 0)}", "table.title")
            yield from Table.__rich_console__(part, console, options)
        if self.caption:
            yield self.caption if isinstance(self.caption, Text) else Text(self.caption, "table.caption")

    def _divided(self, room: int) -> Iterator["FittingTable"]:
        """Yields tables of some of the columns that are no wider than ``room``, if one figure beside words can be."""
        figures = [column.justify == "right" for column in self.columns]
        names = max(1, figures.index(True)) if any(figures) else 1
        first, rest = self.columns[:names], self.columns[names:]
        while True:
            count = len(rest)
            while (part := self._fitting([*first, *rest[:count]], room)) is None and count > 1:
                count -= 1
            yield part or self._with([*first, *rest[:count]], _TIGHT)
            rest = rest[count:]
            if not rest:
                return

    def _fitting(self, columns: Sequence[Column], room: int) -> "FittingTable | None":
        """Returns a table of some columns that is no wider than ``room``; None if they need more."""
        spans = [self._span(column) for column in columns]
        for padding in (self.padding, _TIGHT) if self.box else (self.padding,):
            _, right, _, left = padding
            left_over = room - len(columns) * (left + right) - (len(columns) + 1 if self.box else 0)
            widths = [span.most for span in spans]
            while sum(widths) > left_over:
                loose = [n for n, span in enumerate(spans) if widths[n] > span.least]
                if not loose:
                    break
                widths[max(loose, key=lambda n: (widths[n] > spans[n].cells, widths[n]))] -= 1
            else:
                return self._with(columns, padding, widths)
        return None

    def _with(
        self, columns: Sequence[Column], padding: tuple[int, int, int, int], widths: Sequence[int | None] = ()
    ) -> "FittingTable":
        """Returns a table of some columns, without title and caption."""
        part = FittingTable(box=self.box, padding=padding, show_header=self.show_header)
        for column, width in zip_longest(columns, widths):
            part.add_column(column.header, justify=column.justify, style=column.style, width=width, overflow="fold")
        for row, *cells in zip(self.rows, *(column.cells for column in columns), strict=True):
            part.add_row(*cells, style=row.style, end_section=row.end_section)
        return part

    def _span(self, column: Column) -> _Span:
        head = _lines([column.header]) if self.show_header else []
        body = _lines(column.cells)
        cells, most = (max(map(cell_len, lines), default=0) for lines in (body, [*head, *body]))
        figures = body if column.justify == "right" else []
        words = (min(cell_len(word), _WORD) for line in body for word in line.split())
        headings = (min(cell_len(word), _HEADING) for line in head for word in line.split())
        least = max((*map(cell_len, figures), *words, *headings), default=0)
        return _Span(least, cells, max(least, min(most, column.max_width or most)))


def _lines(cells: Iterable[RenderableType]) -> list[str]:
    return [line for cell in cells for line in str(cell).split("\n")]
