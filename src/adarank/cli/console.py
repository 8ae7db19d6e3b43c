"""The terminal: its two streams (results go to stdout, progress to stderr; only this package prints), sizes and times."""

from __future__ import annotations

import os
import sys

from rich.console import Console

# Into a pipe or a file lines are as long as they need be: names of tensors are to be found there.
_PIPED = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200
# No markup: formulas, paths and the names of tasks and tensors may hold brackets, which markup would swallow.
out = Console(highlight=False, soft_wrap=True, markup=False, width=_PIPED)
err = Console(stderr=True, highlight=False, markup=False)


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
