"""Tables that no terminal cuts off: what has no room beside the rest goes on beneath it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.text import Text

from adarank.cli import console

_GAP = "  "
_LEAST = 7  # characters of a task's name in one line of its head, before columns go on beneath the others


def lines(rows: Sequence[Sequence[str]], right: Collection[int] = (), gap: str = _GAP) -> list[str]:
    """Rows as lines, each column as wide as its widest cell; those with numbers in `right` end at the same place."""
    widths = [max(cell_len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        gap.join(
            " " * (width - cell_len(cell)) + cell if place in right else cell + " " * (width - cell_len(cell))
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def print_lines(of_table: Sequence[str], indent: int = 0, heads: int = 1) -> None:
    """Lines as they are, the first ones as heads."""
    for number, line in enumerate(of_table):
        console.out.print(Text(" " * indent + line, style="bold" if number < heads else ""), soft_wrap=True)


def fit(of_table: Sequence[str], indent: int = 0) -> bool:
    """Whether lines have room; in a pipe there is always room."""
    return console.out.soft_wrap or max(map(cell_len, of_table), default=0) + indent <= console.out.width


def listing(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> None:
    """Rows that begin with a long name: in one line each, or the name in a line of its own with the rest beneath it."""
    whole = lines([heads, *rows], right)
    if fit(whole):
        print_lines(whole)
        return
    under = lines([heads[1:], *(row[1:] for row in rows)], {place - 1 for place in right})
    for number, (name, rest) in enumerate(zip([heads[0], *(row[0] for row in rows)], under, strict=True)):
        style = "bold" if number == 0 else ""
        console.write(name, hang=2, style=style)
        console.write(rest, 2, 4, style=style) if not fit([rest], 2) else print_lines([rest], 2, int(number == 0))


def wide(lead: Sequence[Sequence[str]], more: Sequence[Sequence[str]], dim_last: bool = False) -> None:
    """A table with a column per task.

    Arguments:
        lead: columns, each its head and cells. The first holds labels.
        more: the tasks' columns. Heads are broken into lines where that gives them room; those that have none even so go
            on in a second table beneath, with the labels again.
        dim_last: the last row stands back.
    """
    room = 10**6 if console.out.soft_wrap else console.out.width
    labels = [_folded(cell, max(12, room // 3)) for cell in lead[0]]
    rest = list(more)
    figures = [[_folded(cell, max(9, room // 5)) for cell in column] for column in lead[1:]]
    while True:
        left = room - _width(labels) - sum(_width(column) + 1 for column in figures)
        taken = _broken(rest, left)
        _print_wide([labels, *figures, *taken], dim_last)
        rest, figures = rest[len(taken) :], []
        if not rest:
            return
        console.out.print()


def _broken(columns: Sequence[Sequence[str]], room: int) -> list[list[str]]:
    """As many columns as have room, at least one, with heads in as few lines as will do."""
    longest = max((cell_len(column[0]) for column in columns), default=0)
    for most in range(longest, _LEAST - 1, -1):
        made = [[_folded(column[0], most), *column[1:]] for column in columns]
        if sum(_width(column) + 1 for column in made) <= room:
            return made
    made = [[_folded(column[0], _LEAST + 3), *column[1:]] for column in columns]
    count = 0
    for column in made:
        room -= _width(column) + 1
        if room < 0 and count:
            break
        count += 1
    return made[:count]


def _folded(text: str, most: int) -> str:
    """Text over lines of at most `most` characters, broken before a mark such as _ or / where that can be."""
    made, line = [], ""
    for part in re.findall(r"[^_\-./ ]*[_\-./ ]?", text):
        if line and len(line) + len(part) > most:
            made.append(line)
            line = ""
        line += part
        while len(line) > most:
            made.append(line[:most])
            line = line[most:]
    return "\n".join([*made, line] if line or not made else made)


def _width(column: Sequence[str] | list[str]) -> int:
    return max(cell_len(part) for cell in column for part in cell.split("\n"))


def _print_wide(columns: Sequence[Sequence[str]], dim_last: bool) -> None:
    rows = [list(row) for row in zip(*columns, strict=True)]
    drawn: list[list[str]] = []
    starts: list[int] = []
    for number, row in enumerate(rows):
        cells = [cell.split("\n") for cell in row]
        height = max(map(len, cells))
        empty = [[""] * (height - len(cell)) for cell in cells]
        starts.append(len(drawn))
        # heads stand on the first row, labels hang from the figures' line
        filled = [gap + cell if number == 0 else cell + gap for cell, gap in zip(cells, empty, strict=True)]
        drawn += [list(parts) for parts in zip(*filled, strict=True)]
    made = lines(drawn, right=range(1, len(columns)), gap=" ")
    last = starts[-1] if dim_last else len(made)
    for number, line in enumerate(made):
        style = "bold" if number < starts[1] else "dim" if number >= last else ""
        console.out.print(Text(line, style=style), soft_wrap=True)
