"""Sizes of files as people write them."""

from __future__ import annotations

import re
from typing import Any

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
