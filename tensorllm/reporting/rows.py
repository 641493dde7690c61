"""Rows of text as a table of 80 columns; imports little, so that `tensorllm list` is quick."""

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

WIDTH = 80  # columns of a terminal
MANY = 24  # rows that may take several lines each


def new_table(*columns: str, number_from: int) -> Table:
    """A table whose columns from index `number_from` on hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = index >= number_from
        table.add_column(
            column,
            justify="right" if numeric else "left",
            no_wrap=index == 0,
            overflow="fold",  # a truncated number would be a wrong number
        )
    return table


def rows_table(rows: list[dict[str, str]]) -> RenderableType:
    """A table of rows of text with the same keys."""
    if rows and len(rows) <= MANY and _words_width(rows) > WIDTH:
        return _blocks(rows)
    table = new_table(*(rows[0] if rows else ["nothing"]), number_from=99)
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]] if rows else []
    if sum(widths) + len(widths) + 1 <= WIDTH < sum(widths) + 3 * len(widths) - 1:
        table.padding = (0, 0)  # narrow gaps keep every row on one line
    for row in rows:
        table.add_row(*row.values())
    return table


def _words_width(rows: list[dict[str, str]]) -> int:
    """The least width of a table in which no word is broken."""
    longest = {key: max(map(len, key.split())) for key in rows[0]}
    for row in rows:
        for key, text in row.items():
            longest[key] = max([longest[key], *map(len, text.split())])
    return sum(longest.values()) + len(longest) + 1


def _blocks(rows: list[dict[str, str]]) -> RenderableType:
    """Each row's first cell, with the other cells listed beside it."""
    first, second, *others = rows[0]
    table = new_table(first, second, number_from=99)
    for row in rows:
        lines = [row[second], *(f"{key}: {row[key]}" for key in others if row[key])]
        table.add_row(row[first], Text("\n".join(lines)))
        if row is not rows[-1]:
            table.add_row()
    return table
