"""Sizes of files as people write them."""

from __future__ import annotations

import re
from typing import Any

from adarank.errors import RecipeError

_UNITS = {
    unit + end: factor**power for end, factor in (("B", 1000), ("iB", 1024)) for power, unit in enumerate("KMGT", 1)
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", re.IGNORECASE)


def shard_bytes(given: Any) -> Any:
    """A size in bytes of a number, or of a text with a unit; None as it is.

    Raises:
        ValueError: it is neither, or less than a byte.

    Example:
        shard_bytes("5GB") == 5 * 10**9 and shard_bytes("1 GiB") == 2**30
    """
    match = _SIZE.fullmatch(given.strip()) if isinstance(given, str) else None
    if match:
        known = {unit.lower(): size for unit, size in _UNITS.items()}
        given = int(float(match[1]) * known[match[2].lower()])
    if given is None or (isinstance(given, int) and not isinstance(given, bool) and given > 0):
        return given
    raise ValueError("a size is a number of bytes, or has a unit, such as 5GB, 500MB or 2GiB")


def bytes_of(option: str, text: str | None) -> int | None:
    """What an option of the command line says, in bytes; None where it is not given.

    Raises:
        RecipeError: it is no size.
    """
    if text is None:
        return None
    try:
        return int(shard_bytes(int(text) if text.isdigit() else text))
    except ValueError as error:
        raise RecipeError(f"{option}: {error} (got '{text}').") from None


def size_text(count: int) -> str:
    """Bytes as an option takes them, rounded up to three digits: `1.25GB`, `384MB`."""
    unit, factor = ("GB", 10**9) if count >= 10**9 else ("MB", 10**6)
    digits = 2 if count < 10 * factor else 1 if count < 100 * factor else 0
    scale = factor // 10**digits
    return f"{-(-count // scale) / 10**digits:.{digits}f}{unit}"
