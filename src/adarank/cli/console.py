"""The terminal: its two streams (results go to stdout, progress to stderr; only this package prints), lines, sizes and times."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.text import Text


def _console(stderr: bool) -> Console:
    """A stream. On a terminal, or where COLUMNS is set, lines are as wide as that; else names and paths stay whole."""
    # No markup: formulas, paths and the names of tasks and tensors may hold brackets, which markup would swallow.
    free = not (sys.stderr if stderr else sys.stdout).isatty() and "COLUMNS" not in os.environ
    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=free, width=200 if free else None)


out = _console(stderr=False)
err = _console(stderr=True)


def write(
    text: str | Text, indent: int = 0, hang: int | None = None, style: str = "", console: Console | None = None
) -> None:
    """A sentence, broken between words where the line ends.

    Arguments:
        indent: spaces before the first line.
        hang: spaces before the others; by default as many.
        console: the stream; by default stdout.
    """
    console = console or out
    hang = indent if hang is None else hang
    for number, line in enumerate(_lines(text, console, max(indent, hang))):
        spaces = indent if number == 0 else hang
        line.rstrip()
        console.print(Text.assemble(" " * spaces, line, style=style), soft_wrap=True)


def head(first: object, rest: str, style: str = "bold", indent: int = 0, hang: int | None = None) -> None:
    """A sentence whose beginning stands out."""
    write(Text.assemble((str(first), style), rest), indent, hang)


def _lines(text: str | Text, console: Console, indent: int) -> list[Text]:
    whole = text if isinstance(text, Text) else Text(text)
    if console.soft_wrap:
        return list(whole.split("\n"))
    return list(whole.wrap(console, max(20, console.width - indent)))


def tell(message: str) -> None:
    """An error or another message of several lines on stderr: each keeps its own indentation."""
    for line in message.split("\n"):
        depth = len(line) - len(line.lstrip(" "))
        write(line.strip(), depth, depth + 2 if depth else 0, console=err)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def clock(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def recent(values: list[float]) -> float:
    """Mean of the last ten."""
    return sum(values[-10:]) / len(values[-10:])
