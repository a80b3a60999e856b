"""Tables for terminals and for HTML pages."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from dmagent_loader.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose cells are text.

    Args:
        columns: Headings of the columns; a line break starts a second line.
        rows: Cells of each row, one per column.
        groups: (heading, number of columns) above the columns, covering all of them; empty: no group headings.
        numeric: Whether the columns after the first hold numbers and are right-aligned.
        num_texts: Number of columns at the end that hold sentences, which pages break into lines.

    Raises:
        ConfigurationError: The width of a row or of the groups is not that of the columns.

    Example:
        >>> table = Table(columns=("method", "loss"), rows=[("base", "3.51"), ("agent", "3.40")])
        >>> print(table.to_text())
        method  loss
        ------------
        base    3.51
        agent   3.40
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[tuple[str, int]] = ()
    numeric: bool = True
    num_texts: int = 0

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ConfigurationError(
                    f"row {list(row)} has {len(row)} cells, but there are {len(self.columns)} columns"
                )
        if self.groups and sum(span for _, span in self.groups) != len(self.columns):
            raise ConfigurationError(f"groups {list(self.groups)} do not cover the {len(self.columns)} columns")

    def to_text(self) -> str:
        """Monospaced text without trailing blanks."""
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]
        start = 0
        for heading, span in self.groups:
            # A heading wider than its columns would run into the next group.
            missing = len(heading) - (sum(widths[start : start + span]) + 2 * (span - 1))
            if missing > 0:
                widths[start + span - 1] += missing
            start += span
        lines = [self._line(self.columns, widths)]
        if self.groups:
            lines.insert(0, self._group_line(widths))
        lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
        lines += [self._line(row, widths) for row in self.rows]
        return "\n".join(lines)

    def to_html(self) -> str:
        """A ``<table>`` with escaped cells."""
        numbers = len(self.columns) - self.num_texts
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns[:numbers])
        head += "".join(f'<th class="long">{html.escape(column)}</th>' for column in self.columns[numbers:])
        if self.groups:
            spans = "".join(f'<th class="group" colspan="{n}">{html.escape(name)}</th>' for name, n in self.groups)
            head = f"{spans}</tr>\n<tr>{head}"
        body = "\n".join(f"<tr>{_row_html(row, numbers)}</tr>" for row in self.rows)
        kind = "" if self.numeric else ' class="text"'
        return f"<table{kind}>\n<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>"

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        parts = [
            cell.rjust(width) if i and self.numeric else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    def _group_line(self, widths: Sequence[int]) -> str:
        parts, start = [], 0
        for heading, span in self.groups:
            width = sum(widths[start : start + span]) + 2 * (span - 1)
            parts.append(heading.rjust(width) if start else heading.ljust(width))
            start += span
        return "  ".join(parts).rstrip()


def _row_html(cells: Sequence[str], numbers: int) -> str:
    first, *others = map(html.escape, cells)
    texts = "".join(f'<td class="long">{cell}</td>' for cell in others[numbers - 1 :])
    return f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others[: numbers - 1]) + texts
